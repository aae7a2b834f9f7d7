// The operators that every instruction set provides. To add one: a line in CTXFAST_CPU_OPERATORS,
// its argument struct in a header of its own, its definition in a source of this directory.
#pragma once

#include "cpu/attention.h"
#include "cpu/layer_norm.h"
#include "cpu/lstm.h"

#define CTXFAST_CPU_OPERATORS(apply)                                                      \
  apply(add_layer_norm, AddLayerNormArgs) apply(embed_layer_norm, EmbedLayerNormArgs)     \
      apply(attention_forward, AttentionForwardArgs)                                      \
          apply(attention_backward, AttentionBackwardArgs) apply(lstm_pack, LstmPackArgs) \
              apply(lstm_forward, LstmForwardArgs) apply(lstm_backward, LstmBackwardArgs)

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
