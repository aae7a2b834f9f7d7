// The operators that every instruction set provides. To add one: a line in CTXFAST_CPU_OPERATORS,
// its argument struct in a header of its own, its definition in a source of this directory.
#pragma once

#include "cpu/attention.h"
#include "cpu/cross_entropy.h"
#include "cpu/layer_norm.h"
#include "cpu/quantize.h"

// clang-format off
#define CTXFAST_CPU_OPERATORS(apply)                            \
  apply(add_layer_norm, AddLayerNormArgs)                       \
  apply(add_layer_norm_backward, AddLayerNormBackwardArgs)      \
  apply(embed_layer_norm, EmbedLayerNormArgs)                   \
  apply(embed_layer_norm_backward, EmbedLayerNormBackwardArgs)  \
  apply(attention_forward, AttentionForwardArgs)                \
  apply(attention_backward, AttentionBackwardArgs)              \
  apply(cross_entropy, CrossEntropyArgs)                        \
  apply(quantize_rows, QuantizeRowsArgs)                        \
  apply(dequantize_rows, DequantizeArgs)
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
