// Memory under watch: bounds of every access, and races by happens-before (FastTrack: Flanagan and
// Freund, 2009).
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "simt/clock.h"

namespace simt {

// Two bytes of memory: the last write, and the reads since then that are not ordered among
// themselves.
struct Cell {
  int32_t writer = -1, reader = -1;
  uint32_t write_time = 0, read_time = 0;
  int32_t more = -1;      // index of further reads
  bool constant = false;  // read as constant memory
};

struct Region {
  std::string name;
  char* begin;
  size_t bytes;
  bool constant;     // nobody may write it
  size_t slice = 0;  // bytes of each block's own part, where the region is shared memory
  std::vector<Cell> cells;
};

enum class Access { kPlain, kConstant, kRemote };

class Memory {
 public:
  void clear();
  void add(std::string name, void* begin, size_t bytes, bool constant, size_t slice = 0);
  void remove(const std::string& name);
  // A new launch: everything before it is ordered before it.
  void forget_accesses();

  // Empty if the access is sound; otherwise what is wrong with it. block: index of the block, for
  // its shared memory.
  std::string read(const void* address, size_t bytes, Access kind, int block, int thread,
                   const Clock& clock);
  std::string write(void* address, size_t bytes, Access kind, int block, int thread,
                    const Clock& clock);
  // Atomic accesses do not race with one another, but must not be mixed with plain ones.
  std::string atomic(const void* address, int block);

 private:
  using Reads = std::vector<std::pair<int, uint32_t>>;
  Region* find(const void* address, size_t bytes);
  std::string locate(const void* address, size_t bytes, Access kind, int block, bool writes,
                     Region** found);
  void record_read(Cell& cell, int thread, const Clock& clock);

  std::map<const char*, Region> regions_;
  Region* last_ = nullptr;
  std::vector<Reads> reads_;
  std::vector<int> spare_;
  std::map<const void*, bool> atomics_;
};

}  // namespace simt
