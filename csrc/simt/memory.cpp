#include "simt/memory.h"

namespace simt {
namespace {

std::string where(const Region& region, const void* address) {
  const size_t offset = static_cast<const char*>(address) - region.begin;
  return region.name + " + " + std::to_string(region.slice ? offset % region.slice : offset);
}

}  // namespace

void Memory::clear() {
  regions_.clear();
  last_ = nullptr;
}

void Memory::add(std::string name, void* begin, size_t bytes, bool constant, size_t slice) {
  if (bytes == 0) return;
  char* start = static_cast<char*>(begin);
  Region region{std::move(name), start, bytes, constant, slice, {}};
  region.cells.resize(constant ? 0 : (bytes + 1) / 2);
  regions_[start] = std::move(region);
  last_ = nullptr;
}

void Memory::remove(const std::string& name) {
  for (auto it = regions_.begin(); it != regions_.end();) {
    it = it->second.name == name ? regions_.erase(it) : std::next(it);
  }
  last_ = nullptr;
}

void Memory::forget_accesses() {
  for (auto& entry : regions_) {
    std::fill(entry.second.cells.begin(), entry.second.cells.end(), Cell());
  }
  reads_.clear();
  spare_.clear();
  atomics_.clear();
}

Region* Memory::find(const void* address, size_t bytes) {
  const char* begin = static_cast<const char*>(address);
  const auto inside = [&](const Region& r) {
    return begin >= r.begin && begin + bytes <= r.begin + r.bytes;
  };
  if (last_ && inside(*last_)) return last_;
  auto it = regions_.upper_bound(begin);
  if (it == regions_.begin()) return nullptr;
  Region& region = std::prev(it)->second;
  return inside(region) ? last_ = &region : nullptr;
}

std::string Memory::locate(const void* address, size_t bytes, Access kind, int block, bool writes,
                           Region** found) {
  Region* region = *found = find(address, bytes);
  if (!region) return "out of bounds";
  if (reinterpret_cast<uintptr_t>(address) % bytes) return "misaligned: " + where(*region, address);
  if (writes && region->constant) return "write to constant memory: " + where(*region, address);
  if (region->slice && kind != Access::kRemote) {
    const size_t offset = static_cast<const char*>(address) - region->begin;
    if (int(offset / region->slice) != block) return "another block's shared memory";
  }
  if (region->slice && kind == Access::kConstant) return "shared memory read as constant";
  if (!atomics_.empty() && atomics_.count(address)) {
    return "plain access to an atomic word: " + where(*region, address);
  }
  return {};
}

std::string Memory::read(const void* address, size_t bytes, Access kind, int block, int thread,
                         const Clock& clock) {
  Region* region;
  std::string wrong = locate(address, bytes, kind, block, false, &region);
  if (!wrong.empty() || region->constant) return wrong;
  const size_t first = (static_cast<const char*>(address) - region->begin) / 2;
  for (size_t i = first; i < first + (bytes + 1) / 2; ++i) {
    Cell& cell = region->cells[i];
    if (cell.writer >= 0 && !clock.knows(thread, cell.writer, cell.write_time)) {
      return "race: read of " + where(*region, address) + " after a write by thread " +
             std::to_string(cell.writer) + " that is not ordered before it";
    }
    if (kind == Access::kConstant) {
      if (cell.writer >= 0) return "written in this kernel: " + where(*region, address);
      cell.constant = true;
    }
    record_read(cell, thread, clock);
  }
  return {};
}

void Memory::record_read(Cell& cell, int thread, const Clock& clock) {
  // A read that the reader knows of needs no record beside this one: what is ordered after this one
  // is after it too.
  if (cell.reader < 0 || clock.knows(thread, cell.reader, cell.read_time)) {
    cell.reader = thread;
    cell.read_time = clock.own;
    return;
  }
  if (cell.more < 0) {
    if (spare_.empty()) {
      spare_.push_back(int(reads_.size()));
      reads_.emplace_back();
    }
    cell.more = spare_.back();
    spare_.pop_back();
  }
  for (auto& [reader, time] : reads_[cell.more]) {
    if (clock.knows(thread, reader, time)) {
      reader = thread;
      time = clock.own;
      return;
    }
  }
  reads_[cell.more].emplace_back(thread, clock.own);
}

std::string Memory::write(void* address, size_t bytes, Access kind, int block, int thread,
                          const Clock& clock) {
  Region* region;
  std::string wrong = locate(address, bytes, kind, block, true, &region);
  if (!wrong.empty()) return wrong;
  const size_t first = (static_cast<const char*>(address) - region->begin) / 2;
  for (size_t i = first; i < first + (bytes + 1) / 2; ++i) {
    Cell& cell = region->cells[i];
    if (cell.constant) return "read as constant in this kernel: " + where(*region, address);
    if (cell.writer >= 0 && !clock.knows(thread, cell.writer, cell.write_time)) {
      return "race: two writes of " + where(*region, address) + ", the first by thread " +
             std::to_string(cell.writer);
    }
    bool ordered = cell.reader < 0 || clock.knows(thread, cell.reader, cell.read_time);
    if (cell.more >= 0) {
      for (auto [reader, time] : reads_[cell.more]) ordered &= clock.knows(thread, reader, time);
      reads_[cell.more].clear();
      spare_.push_back(cell.more);
      cell.more = -1;
    }
    if (!ordered) {
      return "race: write of " + where(*region, address) + " while thread " +
             std::to_string(cell.reader) + " or another may still read it";
    }
    cell.reader = -1;
    cell.writer = thread;
    cell.write_time = clock.own;
  }
  return {};
}

std::string Memory::atomic(const void* address, int block) {
  Region* region = find(address, 4);
  if (!region) return "out of bounds";
  if (region->constant) return "atomic access to constant memory: " + where(*region, address);
  const size_t first = (static_cast<const char*>(address) - region->begin) / 2;
  if (region->cells[first].writer >= 0 || region->cells[first].reader >= 0) {
    return "atomic access to a plain word: " + where(*region, address);
  }
  atomics_[address] = true;
  return {};
}

}  // namespace simt
