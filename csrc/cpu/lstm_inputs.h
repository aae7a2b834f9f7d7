// The part of the gates that does not wait for the loop of lstm_forward.cpp.
#pragma once

#include "cpu/kernel_table.h"
#include "cpu/lstm_split.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

// Whether weights are split: what a step of training reads is then multiplied on tiles.
CTXFAST_INLINE bool splits(const LstmForwardArgs& args) {
  const LstmSizes& sizes = args.sizes;
  if (args.weight != kPlainWeight || !splits_weights(sizes, args.count)) return false;
  for (int k = 0; k < args.count; ++k) {
    const LstmForwardDirection& way = args.directions[k];
    if (way.packed != nullptr || way.kept_gates == nullptr) return false;
    if (way.input_stride[0] != sizes.steps * way.input_stride[1]) return false;
  }
  return true;
}

// What the input contributes to the gates of all steps, in one product.
CTXFAST_INLINE Status multiply_inputs(const LstmForwardArgs& args) {
  const LstmSizes& sizes = args.sizes;
  Status status;
  for (int k = 0; k < args.count && status.code == kOk; ++k) {
    const LstmForwardDirection& way = args.directions[k];
    MatrixProductArgs product = {};
    product.dtype = sizes.dtype;
    product.float_parts = 3;
    product.a = way.input;
    product.a_row = way.input_stride[1];
    product.a_depth = 1;
    product.b = way.weight_ih;
    product.b_depth = 1;
    product.b_column = sizes.inputs;
    product.bias = way.bias;
    product.c = way.kept_gates;
    product.rows = sizes.batch * sizes.steps;
    product.columns = kGates * sizes.hidden;
    product.depth = sizes.inputs;
    product.threads = sizes.threads;
    status = matrix_product(product);
  }
  return status;
}

CTXFAST_NAMESPACE_END

#endif
