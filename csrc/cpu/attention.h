// Arguments of the attention operators. Strides are in elements; a stride of 0 broadcasts.
#pragma once

#include <cstdint>

#include "status.h"

namespace ctxfast {

struct AttentionArgs {
  Dtype dtype;
  const void* query;  // rows of head_dim elements with unit stride, as key, value and output
  const void* key;
  const void* value;
  int64_t query_stride[3], key_stride[3], value_stride[3];  // batch, head, row
  int64_t batch, heads, head_dim;
  int64_t seqlen_q, seqlen_k;   // padded: the sizes; packed: the rows of query and key
  const int32_t* cu_seqlens_q;  // [batch + 1], or nullptr: padded
  const int32_t* cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;  // packed: no sequence may be longer

  const uint8_t* attn_mask;  // or nullptr; nonzero = attend
  int64_t attn_mask_stride[4];
  const uint8_t* key_padding_mask;  // or nullptr; nonzero = attend
  int64_t key_padding_mask_stride[2];
  const void* bias;  // or nullptr
  Dtype bias_dtype;  // dtype or kFloat32
  int64_t bias_stride[4];
  int64_t window_left,
      window_right;  // row i attends i - left <= j <= i + right; -1 leaves a side open
  double scale;
  uint32_t dropout_threshold;  // 16-bit fields below it are dropped; 0: no dropout
  uint64_t seed;
  int threads;
};

struct AttentionForwardArgs {
  AttentionArgs common;
  void* output;
  int64_t output_stride[3];  // batch, head, row
  void* lse;                 // float, or double for double; unit stride from row to row
  int64_t lse_stride[2];     // batch, head
};

struct AttentionBackwardArgs {
  AttentionArgs common;
  const void* grad_output;
  int64_t grad_output_stride[3];  // batch, head, row
  const void* grad_lse;           // or nullptr: zero; the dtype of lse
  int64_t grad_lse_stride[3];     // batch, head, row
  const void* output;
  int64_t output_stride[3];
  const void* lse;
  int64_t lse_stride[3];
  void* grad_query;
  void* grad_key;
  void* grad_value;
  int64_t grad_query_stride[3], grad_key_stride[3], grad_value_stride[3];
  void* grad_bias;              // or nullptr; float, or double for double; zero on entry
  int64_t grad_bias_stride[4];  // 0 along the dimensions that the bias is broadcast over
  void* partial_bias;  // [batch, heads, longest], zero on entry, where the last or last but one of
                       // them is 0
  int64_t partial_bias_length;
};

}  // namespace ctxfast
