// Small grids with known verdicts, for the tests of the machine itself.
#include <map>
#include <string>

#include "cuda/device.cuh"

namespace {

using namespace ctxfast::cuda;

// All work on one buffer of floats: word 0 is a flag, data begin at word 64.
struct Buffer {
  float* data;
  uint32_t* flag() const { return reinterpret_cast<uint32_t*>(data); }
  float* at(int i) const { return data + 64 + i; }
};

bool first_block() { return block_index().x == 0; }

// Block 0 writes, tells block 1 through a flag, and block 1 reads. F: scope of the fence, A: of the
// acquiring read.
template <Scope F, Scope A, bool Fence, bool Acquire>
void message(const Buffer& buffer) {
  if (first_block()) {
    write(buffer.at(thread_index()), 1.0f);
    block_barrier();
    if (thread_index() != 0) return;
    if constexpr (Fence) fence<F>();
    add_relaxed(buffer.flag(), 1);
  } else {
    if (thread_index() == 0) {
      if constexpr (Acquire) {
        while (read_acquire<A>(buffer.flag()) == 0) pause();
      } else {
        while (read_relaxed(buffer.flag()) == 0) pause();
      }
    }
    block_barrier();
    write(buffer.at(100 + thread_index()), read(buffer.at(31 - thread_index())));
  }
}

void neighbours(const Buffer& buffer, bool barrier) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  write(shared + thread_index(), float(thread_index()));
  if (barrier) block_barrier();
  const float other = read(shared + (thread_index() + 1) % 64);
  if (first_block()) write(buffer.at(thread_index()), other);
}

void remote(const Buffer& buffer, bool barrier) {
  Words2* shared = reinterpret_cast<Words2*>(shared_memory());
  const int rank = block_index().x;
  write_remote(shared + thread_index(), 1 - rank, Words2{uint32_t(rank), 0});
  if (barrier) {
    cluster_barrier();
  } else {
    block_barrier();
  }
  write(buffer.at(rank * 64 + thread_index()), float(read(shared + thread_index()).x));
}

// c [16, 8] = a [16, 16] b [16, 8]: a at 0, b as [8, 16] at 256, c at 384; values that bfloat16
// holds exactly.
void product(const Buffer& buffer) {
  const int lane = thread_index(), row = lane / 4, pair = lane % 4 * 2;
  const auto two = [&](int at) {
    return uint32_t(from_float<bfloat16>(read(buffer.at(at))).bits) |
           uint32_t(from_float<bfloat16>(read(buffer.at(at + 1))).bits) << 16;
  };
  float c[4] = {};
  mma<bfloat16>(c, two(row * 16 + pair), two((row + 8) * 16 + pair), two(row * 16 + pair + 8),
                two((row + 8) * 16 + pair + 8), two(256 + row * 16 + pair),
                two(256 + row * 16 + pair + 8));
  for (int i = 0; i < 4; ++i) write(buffer.at(384 + (row + i / 2 * 8) * 8 + pair + i % 2), c[i]);
}

using Kernel = void (*)(const Buffer&);
constexpr Scope kBlock = Scope::kBlock, kCluster = Scope::kCluster, kDevice = Scope::kDevice;

const std::map<std::string, Kernel> kKernels = {
    {"message", message<kDevice, kDevice, true, true>},
    {"message without fence", message<kDevice, kDevice, false, true>},
    {"message without acquire", message<kDevice, kDevice, true, false>},
    {"message in a block", message<kBlock, kDevice, true, true>},
    {"message in a cluster", message<kCluster, kCluster, true, true>},
    {"message acquired in a block", message<kDevice, kBlock, true, true>},
    {"neighbours", [](const Buffer& b) { neighbours(b, true); }},
    {"neighbours without barrier", [](const Buffer& b) { neighbours(b, false); }},
    {"remote", [](const Buffer& b) { remote(b, true); }},
    {"remote without barrier", [](const Buffer& b) { remote(b, false); }},
    {"product", product},
    {"flag nobody sets",
     [](const Buffer& b) {
       while (read_acquire<kDevice>(b.flag()) == 0) pause();
     }},
    {"barriers of two kinds",
     [](const Buffer&) { thread_index() < 32 ? block_barrier() : cluster_barrier(); }},
    {"half a warp",
     [](const Buffer&) {
       float c[4] = {};
       if (thread_index() % 2) mma<bfloat16>(c, 0, 0, 0, 0, 0, 0);
     }},
    {"out of bounds", [](const Buffer& b) { read(b.at(1 << 20)); }},
    {"misaligned", [](const Buffer& b) { read(reinterpret_cast<const Words4*>(b.at(1))); }},
    {"beyond shared memory",
     [](const Buffer&) { write(reinterpret_cast<float*>(shared_memory() + 1024), 1.0f); }},
    {"constant that is written",
     [](const Buffer& b) {
       if (thread_index() == 0 && first_block()) write(b.at(0), read_constant(b.at(0)));
     }},
    {"plain access to a flag",
     [](const Buffer& b) {
       if (thread_index() == 0 && first_block()) {
         add_relaxed(b.flag(), 1);
         read(b.data);
       }
     }},
};

void run(const void* argument) {
  const auto& [kernel, buffer] = *static_cast<const std::pair<Kernel, Buffer>*>(argument);
  kernel(buffer);
}

std::string text;

}  // namespace

// Runs a grid of `blocks` blocks of `threads` threads, `cluster` blocks a cluster; empty if nothing
// was found.
extern "C" const char* simt_self_test(const char* name, float* data, int blocks, int threads,
                                      int cluster) {
  const std::pair<Kernel, Buffer> call = {kKernels.at(name), {data}};
  text = simt::machine().launch({{blocks, 1, 1}, threads, cluster, 1024}, run, &call);
  return text.c_str();
}
