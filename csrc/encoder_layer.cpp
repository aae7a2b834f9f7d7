// The encoder layer of Vaswani et al. (2017) with the norms behind the residual additions, made of
// the kernels that its parts run on: the results are theirs, bit for bit.
#include "encoder_layer.h"

#include <algorithm>

#include "dispatch.h"

namespace ctxfast {
namespace {

int64_t element_size(Dtype dtype) { return dtype == kBfloat16 ? 2 : 4; }

// Parts of the workspace. `wide` holds the projections, then the inner activations.
struct Workspace {
  char *lse, *wide, *context, *attended;
  int64_t bytes;

  explicit Workspace(const EncoderLayerArgs& args) {
    const int64_t element = element_size(args.dtype);
    const int64_t state = args.hidden * args.rows * element;
    lse = static_cast<char*>(args.workspace);
    wide = lse + args.heads * args.rows * int64_t(sizeof(float));
    context = wide + std::max(3 * args.hidden, args.intermediate) * args.rows * element;
    attended = context + state;
    bytes = attended + state - lse;
  }
};

Status linear(const EncoderLayerArgs& args, int which, const void* input, int64_t depth,
              void* output, int64_t columns, Activation activation) {
  LinearArgs call = {};
  call.dtype = args.dtype;
  call.input = input;
  call.input_stride = depth;
  call.panels = args.linears[which].panels;
  call.bias = args.linears[which].bias;
  call.output = output;
  call.rows = args.rows;
  call.depth = depth;
  call.columns = columns;
  call.activation = activation;
  call.threads = args.threads;
  return kernels().linear(call);
}

Status attention(const EncoderLayerArgs& args, const Workspace& work) {
  const int64_t hidden = args.hidden, head_dim = hidden / args.heads;
  AttentionForwardArgs call = {};
  AttentionArgs& common = call.common;
  const int64_t state = hidden * element_size(args.dtype);
  common.dtype = args.dtype;
  common.query = work.wide;
  common.key = work.wide + state;
  common.value = work.wide + 2 * state;
  for (int64_t* stride : {common.query_stride, common.key_stride, common.value_stride}) {
    stride[1] = head_dim;
    stride[2] = 3 * hidden;
  }
  common.batch = args.batch;
  common.heads = args.heads;
  common.head_dim = head_dim;
  common.seqlen_q = common.seqlen_k = args.rows;
  common.cu_seqlens_q = common.cu_seqlens_k = args.cu_seqlens;
  common.max_seqlen_q = common.max_seqlen_k = args.max_seqlen;
  common.window_left = common.window_right = -1;
  common.scale = args.scale;
  common.threads = args.threads;
  call.output = work.context;
  call.output_stride[1] = head_dim;
  call.output_stride[2] = hidden;
  call.lse = reinterpret_cast<float*>(work.lse);
  call.lse_stride[1] = args.rows;
  return kernels().attention_forward(call);
}

Status add_layer_norm(const EncoderLayerArgs& args, const EncoderNorm& norm, const void* input,
                      const void* residual, void* output) {
  AddLayerNormArgs call = {};
  call.dtype = call.parameter_dtype = args.dtype;
  call.input = input;
  call.residual = residual;
  call.weight = norm.weight;
  call.bias = norm.bias;
  call.output = output;
  call.rows = args.rows;
  call.columns = call.input_stride = call.residual_stride = args.hidden;
  call.eps = norm.eps;
  call.threads = args.threads;
  return kernels().add_layer_norm(call);
}

}  // namespace

int64_t encoder_layer_workspace(const EncoderLayerArgs& args) noexcept {
  return Workspace(args).bytes;
}

Status encoder_layer(const EncoderLayerArgs& args) noexcept {
  const Workspace work(args);
  const int64_t hidden = args.hidden, inner = args.intermediate;
  Status status = linear(args, 0, args.input, hidden, work.wide, 3 * hidden, kNone);
  if (status.code == kOk) status = attention(args, work);
  // The output serves as working space until its values come.
  if (status.code == kOk)
    status = linear(args, 1, work.context, hidden, args.output, hidden, kNone);
  if (status.code == kOk)
    status = add_layer_norm(args, args.norms[0], args.output, args.input, work.attended);
  if (status.code == kOk)
    status = linear(args, 2, work.attended, hidden, work.wide, inner, args.activation);
  if (status.code == kOk) status = linear(args, 3, work.wide, inner, work.context, hidden, kNone);
  if (status.code != kOk) return status;
  return add_layer_norm(args, args.norms[1], work.context, work.attended, args.output);
}

}  // namespace ctxfast
