// How a call of an LSTM operator comes by packed weights that it was not given.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/lstm_team.h"
#include "cpu/lstm_weights.h"

CTXFAST_NAMESPACE_BEGIN

CTXFAST_INLINE const void* weight_ih_of(const LstmForwardDirection& way) { return way.weight_ih; }
CTXFAST_INLINE const void* weight_ih_of(const LstmBackwardDirection&) { return nullptr; }

struct Packing {
  bool backward;
  bool wanted;  // false: weights that have not been packed are read as they are
};

// Packs the weights of directions that have none packed and calls body(first, count) for those
// whose weights are packed: for all at once where they run at the same time, else for one after the
// other, in the same memory. `ordinary`, if it is not nullptr: whether all weights are; nothing
// runs with others.
template <typename W, typename Args, typename Body>
CTXFAST_INLINE Status for_packed_directions(Args& args, const PackedLayout<W>& layout,
                                            WeightType weight, Packing packing, bool* ordinary,
                                            const Body& body) {
  const LstmSizes& sizes = args.sizes;
  Status status;
  const bool together = args.count * layout.recurrent_bytes() <= kTogetherBytes;
  const int count = together ? args.count : 1;
  for (int first = 0; first < args.count; first += count) {
    char* memory = nullptr;
    for (int k = first; k < first + count; ++k) {
      auto& way = args.directions[k];
      if (way.packed != nullptr || !packing.wanted) continue;
      if (memory == nullptr)
        memory = static_cast<char*>(thread_scratch(size_t(count * layout.bytes), kPlanScratch));
      if (memory == nullptr) {
        status.code = kOutOfMemory;
        return status;
      }
      LstmPackedHeader header;
      LstmPackArgs pack = {};
      pack.dtype = sizes.dtype;
      pack.weight = weight;
      pack.backward = packing.backward;
      pack.inputs = sizes.inputs;
      pack.hidden = sizes.hidden;
      pack.features = sizes.features;
      pack.projected = sizes.projected;
      pack.weight_ih = weight_ih_of(way);
      pack.weight_hh = way.weight_hh;
      pack.weight_hr = way.weight_hr;
      pack.packed = memory;
      pack.header = &header;
      pack.threads = sizes.threads;
      status = lstm_pack(pack);
      if (status.code != kOk) return status;
      if (ordinary != nullptr && !(*ordinary = header.ordinary != 0)) return status;
      way.packed = memory;
      memory += layout.bytes;
    }
    body(first, count);
  }
  return status;
}

CTXFAST_NAMESPACE_END
