// A task of the attention backward: the rows of one (sequence, head), and which of their gradients
// are wanted.
#pragma once

#include "cpu/attention_gradient.h"

CTXFAST_NAMESPACE_BEGIN

enum Wanted { kGradQuery = 1, kGradKeyValue = 2, kGradBias = 4 };

struct Range {
  int64_t begin, end;
};

template <typename Storage>
struct GradientTask {
  using T = Compute<Storage>;

  const AttentionBackwardArgs& args;
  const AttentionArgs& common;
  const AttentionSequence& sequence;
  const int64_t index, head;  // of the sequence
  const int wanted;
  const ScoreTerms terms;
  const DropoutRow dropout;
  const T kept;

  GradientTask(const AttentionBackwardArgs& args_, const AttentionSequence& sequence_,
               int64_t index_, int64_t head_, int wanted_)
      : args(args_),
        common(args_.common),
        sequence(sequence_),
        index(index_),
        head(head_),
        wanted(wanted_),
        terms(common, index_, head_, sequence_.holes),
        dropout{common.seed, common.dropout_threshold, head_, index_},
        kept(kept_factor<T>(common.dropout_threshold)) {}

  template <typename P>
  P* rows_of(P* base, const int64_t (&stride)[3], int64_t row) const {
    return base + index * stride[0] + head * stride[1] + row * stride[2];
  }
  const Storage* query_row(const void* base, const int64_t (&stride)[3], int64_t i) const {
    return rows_of(static_cast<const Storage*>(base), stride, sequence.query_start + i);
  }
  const Storage* key_row(const void* base, const int64_t (&stride)[3], int64_t j) const {
    return rows_of(static_cast<const Storage*>(base), stride, sequence.key_start + j);
  }

  // Row i of the next head, as a query and as a key.
  void prefetch(int64_t i) const {
    const int64_t bytes = common.head_dim * int64_t(sizeof(Storage));
    if (i < sequence.query_length) {
      prefetch_bytes(query_row(common.query, common.query_stride, i) + common.query_stride[1],
                     bytes);
      prefetch_bytes(
          query_row(args.grad_output, args.grad_output_stride, i) + args.grad_output_stride[1],
          bytes);
    }
    if (i < sequence.key_length) {
      prefetch_bytes(key_row(common.key, common.key_stride, i) + common.key_stride[1], bytes);
      prefetch_bytes(key_row(common.value, common.value_stride, i) + common.value_stride[1], bytes);
    }
  }

  // Where the gradients of row i will be written, and those of key j.
  void prefetch_query_result(int64_t i) const {
    prefetch_bytes(rows_of(static_cast<Storage*>(args.grad_query), args.grad_query_stride,
                           sequence.query_start + i),
                   common.head_dim * int64_t(sizeof(Storage)));
  }
  void prefetch_key_results(int64_t j) const {
    const int64_t row = sequence.key_start + j, bytes = common.head_dim * int64_t(sizeof(Storage));
    prefetch_bytes(rows_of(static_cast<Storage*>(args.grad_key), args.grad_key_stride, row), bytes);
    prefetch_bytes(rows_of(static_cast<Storage*>(args.grad_value), args.grad_value_stride, row),
                   bytes);
  }

  BiasGradient<T> bias_gradient() const {
    BiasGradient<T> bias;
    if (!(wanted & kGradBias)) return bias;
    T* total = static_cast<T*>(args.grad_bias) + index * args.grad_bias_stride[0] +
               head * args.grad_bias_stride[1];
    T* partial = static_cast<T*>(args.partial_bias) +
                 (index * common.heads + head) * args.partial_bias_length;
    if (args.grad_bias_stride[3] == 0) {
      bias.row_sums = partial;
    } else if (args.grad_bias_stride[2] == 0) {
      bias.rows = partial;
    } else {
      bias.rows = total;
      bias.stride = args.grad_bias_stride[2];
    }
    return bias;
  }

  bool attends(int64_t i, int64_t j) const {
    const KeyRange range = key_range(common, sequence, i);
    return j >= range.begin && j < range.end && shows<T>(terms, i, j);
  }

  T dot(const Storage* a, const Storage* b) const {
    Vec<T> sum = {};
    for (int64_t d = 0; d < common.head_dim; d += kLanes<T>)
      sum += load_n(a + d, common.head_dim - d) * load_n(b + d, common.head_dim - d);
    return reduce_add(sum);
  }

  // delta of a row by its first form, whose kept keys alone decide whether it is a number: to the
  // output of the row a value that is none has come even where dropout gave it the weight 0.
  CTXFAST_NOINLINE T delta_of_keys(int64_t i, T lse) const {
    const KeyRange range = key_range(common, sequence, i);
    const Storage* query = query_row(common.query, common.query_stride, i);
    const Storage* grad = query_row(args.grad_output, args.grad_output_stride, i);
    T sum = T(0);
    for (int64_t j = range.begin; j < range.end; ++j) {
      if (!shows<T>(terms, i, j) || drops(i, j)) continue;
      T score = dot(query, key_row(common.key, common.key_stride, j)) * T(common.scale * kLog2E);
      if (terms.bias != nullptr) score += in_base_2<T>(load_bias<T>(terms, i, j, 1))[0];
      const T weight = exp2_nonpositive<false>(splat<T>(score - lse))[0];
      sum += weight * kept * dot(grad, key_row(common.value, common.value_stride, j));
    }
    return sum;
  }
  bool drops(int64_t i, int64_t j) const {
    if (dropout.threshold == 0) return false;
    const uint64_t kept_bits =
        kept_columns(dropout.seed, dropout.threshold, j / 64, i, dropout.head, dropout.sequence);
    return (kept_bits >> (j % 64) & 1) == 0;
  }
};

CTXFAST_NAMESPACE_END
