// The operators that every instruction set provides. To add one: a line in CTXFAST_CPU_OPERATORS,
// its argument struct in a header of its own, its definition in a source of this directory.
#pragma once

#include "cpu/attention.h"
#include "cpu/char_cnn.h"
#include "cpu/cross_entropy.h"
#include "cpu/layer_norm.h"
#include "cpu/linear.h"
#include "cpu/linear_int8.h"
#include "cpu/lstm.h"
#include "cpu/matrix_product.h"

// clang-format off: one operator a line.
#define CTXFAST_CPU_OPERATORS(apply) \
  apply(add_layer_norm, AddLayerNormArgs) \
  apply(add_layer_norm_backward, AddLayerNormBackwardArgs) \
  apply(attention_backward, AttentionBackwardArgs) \
  apply(attention_forward, AttentionForwardArgs) \
  apply(char_cnn, CharCnnArgs) \
  apply(char_cnn_backward, CharCnnBackwardArgs) \
  apply(cross_entropy, CrossEntropyArgs) \
  apply(embed_layer_norm, EmbedLayerNormArgs) \
  apply(embed_layer_norm_backward, EmbedLayerNormBackwardArgs) \
  apply(highway_gate, HighwayGateArgs) \
  apply(highway_gate_backward, HighwayGateBackwardArgs) \
  apply(linear, LinearArgs) \
  apply(linear_int8, LinearInt8Args) \
  apply(lstm_backward, LstmBackwardArgs) \
  apply(lstm_forward, LstmForwardArgs) \
  apply(lstm_pack, LstmPackArgs) \
  apply(matrix_product, MatrixProductArgs) \
  apply(weighted_sum, WeightedSumArgs)
// clang-format on

namespace ctxfast {

struct KernelTable {
#define CTXFAST_MEMBER(name, Args) Status (*name)(const Args&);
  CTXFAST_CPU_OPERATORS(CTXFAST_MEMBER)
#undef CTXFAST_MEMBER
};

#ifdef CTXFAST_ISA
namespace CTXFAST_ISA {
#define CTXFAST_DECLARE(name, Args) Status name(const Args&);
CTXFAST_CPU_OPERATORS(CTXFAST_DECLARE)
#undef CTXFAST_DECLARE
}  // namespace CTXFAST_ISA
#endif

}  // namespace ctxfast
