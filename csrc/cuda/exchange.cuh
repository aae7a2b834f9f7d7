// The one exchange of a persistent step: sums over all blocks of a direction, spread again to all
// of them.
//
// The blocks that share rows form G clusters of C. Block r of a cluster adds up slice r of what its
// cluster's blocks computed, through distributed shared memory; the r-th blocks of all clusters
// exchange these through global memory; and each sends its slice of the result to the blocks of its
// cluster. All sums run in a fixed order.
//
// Between clusters: data, then a fence and an addition to a counter; the readers wait until the
// counter shows that all have come. Counters only rise, so no value is ever used twice; two buffers
// suffice, since nobody can be two exchanges ahead of another.
#pragma once

#include "cuda/device.cuh"
#include "cuda/lstm.h"

namespace ctxfast {
namespace cuda {

// The sizes of one persistent kernel.
//   Type: of weights and states; Hidden, Features: H and P; Cluster, Clusters: C and G; Warps of a
//   block Rows: batch rows taken together, a multiple of 8; RegisterBlocks: how many of the slices
//   of 32 columns of the large weight matrix each thread keeps in registers, the others lying in
//   shared memory
template <class Type, int Hidden, int Features, int Cluster, int Clusters, int Warps, int Rows,
          int RegisterBlocks, int Depth = 2>
struct LstmShape {
  using T = Type;
  static constexpr int kHidden = Hidden, kFeatures = Features, kCluster = Cluster;
  static constexpr int kClusters = Clusters, kWarps = Warps, kRows = Rows, kDepth = Depth;
  static constexpr int kRegisterBlocks = RegisterBlocks;
  static constexpr int kThreads = Warps * kWarpSize;
  static constexpr int kUnits = Hidden / (Cluster * Clusters);  // of a block
  static constexpr int kSlice = Features / Cluster;             // features that a block adds up
  static constexpr int kTiles = Rows / 8;
  static constexpr int kStateStride =
      Features + 32;  // of a row of states in shared memory: no bank conflicts
  static constexpr int kSumStride = Features + 4;
  static_assert(Hidden % (Cluster * Clusters) == 0 && kUnits % 32 == 0, "units in blocks of 32");
  static_assert(kUnits % (8 * Warps) == 0 && Features % (16 * Warps) == 0, "tiles of a warp");
  static_assert(Features % 32 == 0 && kSlice % 4 == 0 && Rows % 8 == 0, "vectors");
};

struct Rank {
  int direction, slot, cluster, rank;
};

template <class S>
CTXFAST_DEVICE Rank own_rank() {
  const Index3 block = block_index();
  return {block.y, block.z, block.x / S::kCluster, block.x % S::kCluster};
}

template <class S>
CTXFAST_DEVICE Floats4 read_peer(const Floats4* address, int rank) {
  if constexpr (S::kCluster > 1) return read_remote(address, rank);
  return read(address);
}

// To the same place in every block of the cluster.
template <class S>
CTXFAST_DEVICE void write_peers(Words2* address, Words2 value) {
  if constexpr (S::kCluster > 1) {
    for (int rank = 0; rank < S::kCluster; ++rank) write_remote(address, rank, value);
  } else {
    write(address, value);
  }
}

CTXFAST_DEVICE void add(Floats4& sum, Floats4 x) {
  sum.x += x.x;
  sum.y += x.y;
  sum.z += x.z;
  sum.w += x.w;
}

template <class S>
class AllReduce {
 public:
  // sums: float [Rows, kSumStride] in shared memory; late: one word there
  CTXFAST_DEVICE AllReduce(const Exchange& exchange, const Rank& own, float* sums, int* late)
      : exchange_(exchange), own_(own), sums_(sums), late_(late) {
    const int slot = own.direction * grid_size().z + own.slot;
    counter_ = exchange.counters + (slot * S::kCluster + own.rank) * kCounterStride;
    constexpr size_t kWords = size_t(S::kClusters) * S::kRows * S::kSlice;
    buffer_ = exchange.sums + size_t(slot) * S::kDepth * S::kCluster * kWords + own.rank * kWords;
    if (thread_index() == 0) write(late_, 0);
  }

  // Adds up `sums` of all blocks, for the first `rows` rows, and calls consume(row, first of four
  // features, sum) for this block's slice. What consume writes to the cluster's shared memory is
  // seen by all its blocks afterwards.
  template <class Consume>
  CTXFAST_DEVICE void operator()(int rows, Consume consume) {
    constexpr int kVectors = S::kSlice / 4;
    constexpr size_t kWords = size_t(S::kClusters) * S::kRows * S::kSlice;
    if constexpr (S::kCluster > 1) {
      cluster_barrier();
    } else {
      block_barrier();
    }
    if constexpr (S::kClusters == 1) {
      for (int i = thread_index(); i < rows * kVectors; i += S::kThreads) {
        const int row = i / kVectors, feature = own_.rank * S::kSlice + i % kVectors * 4;
        consume(row, feature, cluster_sum(row, feature));
      }
    } else {
      ++generation_;
      float* buffer = buffer_ + generation_ % S::kDepth * S::kCluster * kWords;
      for (int i = thread_index(); i < rows * kVectors && !abandoned_; i += S::kThreads) {
        const int row = i / kVectors, column = i % kVectors * 4;
        float* place = buffer + (own_.cluster * S::kRows + row) * S::kSlice + column;
        const Floats4 sum = cluster_sum(row, own_.rank * S::kSlice + column);
        write(reinterpret_cast<Floats4*>(place), sum);
      }
      block_barrier();
      if (thread_index() == 0 && !abandoned_) {
        fence<Scope::kDevice>();
        add_relaxed(counter_, 1);
        if (!wait(generation_ * S::kClusters)) write(late_, 1);
      }
      block_barrier();
      abandoned_ = read(late_) != 0;
      for (int i = thread_index(); i < rows * kVectors; i += S::kThreads) {
        const int row = i / kVectors, column = i % kVectors * 4;
        const Floats4 sum = abandoned_ ? not_a_sum() : exchanged_sum(buffer, row, column);
        consume(row, own_.rank * S::kSlice + column, sum);
      }
    }
    if constexpr (S::kCluster > 1) {
      cluster_barrier();
    } else {
      block_barrier();
    }
  }

 private:
  CTXFAST_DEVICE static Floats4 not_a_sum() {
    return {not_a_number(), not_a_number(), not_a_number(), not_a_number()};
  }

  CTXFAST_DEVICE static Floats4 exchanged_sum(const float* buffer, int row, int column) {
    Floats4 sum = {};
#pragma unroll
    for (int cluster = 0; cluster < S::kClusters; ++cluster) {
      const float* place = buffer + (cluster * S::kRows + row) * S::kSlice + column;
      add(sum, read_exchanged(reinterpret_cast<const Floats4*>(place)));
    }
    return sum;
  }

  CTXFAST_DEVICE Floats4 cluster_sum(int row, int feature) const {
    const float* place = sums_ + row * S::kSumStride + feature;
    Floats4 sum = {};
#pragma unroll
    for (int rank = 0; rank < S::kCluster; ++rank) {
      add(sum, read_peer<S>(reinterpret_cast<const Floats4*>(place), rank));
    }
    return sum;
  }

  // False if it has lasted too long, here or in another block. Then nobody waits any more: all
  // blocks run on to their end without exchanging, with NaN for what they did not get.
  CTXFAST_DEVICE bool wait(uint32_t target) const {
    const uint64_t start = nanoseconds();
    for (uint32_t polls = 1;; ++polls) {
      if (int32_t(read_acquire<Scope::kDevice>(counter_) - target) >= 0) return true;
      if (polls % 64 != 0) continue;
      if (read_relaxed(exchange_.abandoned) != 0) return false;
      if (nanoseconds() - start > exchange_.timeout) {
        write_relaxed(exchange_.abandoned, 1);
        write_relaxed(exchange_.error, 1);
        return false;
      }
    }
  }

  const Exchange& exchange_;
  const Rank own_;
  float* const sums_;
  int* const late_;
  uint32_t* counter_;
  float* buffer_;
  uint32_t generation_ = 0;
  bool abandoned_ = false;
};

}  // namespace cuda
}  // namespace ctxfast
