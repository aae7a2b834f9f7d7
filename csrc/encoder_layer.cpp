// The encoder layer of Vaswani et al. (2017) with the norms behind the residual additions, made of
// the kernels that its parts run on: the results are theirs, bit for bit.
#include "encoder_layer.h"

#include <algorithm>

#include "dispatch.h"

namespace ctxfast {
namespace {

constexpr int64_t kLineBytes = 64;

int64_t element_size(Dtype dtype) { return dtype == kBfloat16 ? 2 : 4; }

// Parts of the workspace. `wide` holds the projections, then the inner activations; `context` what
// the attention gives, then what the feed-forward block gives; `states` the input of every second
// layer.
struct Workspace {
  char *lse, *wide, *context, *attended, *states;
  int64_t bytes;

  Workspace(const EncoderLayer& layer, void* memory, int64_t rows) {
    const int64_t element = element_size(layer.dtype), inner = element_size(layer.inner_dtype);
    const int64_t state = layer.hidden * rows * element;
    lse = static_cast<char*>(memory);
    // Rows of the parts behind it then begin where cache lines do.
    const int64_t lse_bytes = layer.heads * rows * int64_t(sizeof(float));
    attended = lse + (lse_bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
    states = attended + state;
    context = states + state;
    wide = context + layer.hidden * rows * std::max(element, inner);
    bytes = wide + std::max(3 * layer.hidden, layer.intermediate) * rows * inner - lse;
  }
};

// One layer on its way from input to output.
struct Run {
  const EncoderLayersArgs& args;
  const EncoderLayer& layer;
  const Workspace& work;

  Status linear(int which, const void* input, Dtype input_dtype, int64_t depth, void* output,
                Dtype output_dtype, int64_t columns, Activation activation = kNone) const {
    const EncoderLinear& weight = layer.linears[which];
    const auto fill = [&](auto& call) {
      call.input = input;
      call.input_stride = depth;
      call.output = output;
      call.rows = args.rows;
      call.depth = depth;
      call.columns = columns;
      call.activation = activation;
      call.threads = args.threads;
    };
    if (weight.scales == nullptr) {
      LinearArgs call = {};
      fill(call);
      call.dtype = input_dtype;
      call.panels = weight.panels;
      call.bias = weight.bias;
      call.float_parts = args.float_parts;
      return kernels().linear(call);
    }
    LinearInt8Args call = {};
    fill(call);
    call.input_dtype = input_dtype;
    call.output_dtype = output_dtype;
    call.panels = static_cast<const int8_t*>(weight.panels);
    call.scales = weight.scales;
    call.sums = weight.sums;
    call.bias = static_cast<const float*>(weight.bias);
    return kernels().linear_int8(call);
  }

  Status attention() const {
    const int64_t hidden = layer.hidden, head_dim = hidden / layer.heads;
    AttentionForwardArgs call = {};
    AttentionArgs& common = call.common;
    const int64_t state = hidden * element_size(layer.inner_dtype);
    common.dtype = layer.inner_dtype;
    common.query = work.wide;
    common.key = work.wide + state;
    common.value = work.wide + 2 * state;
    for (int64_t* stride : {common.query_stride, common.key_stride, common.value_stride}) {
      stride[1] = head_dim;
      stride[2] = 3 * hidden;
    }
    common.batch = args.batch;
    common.heads = layer.heads;
    common.head_dim = head_dim;
    common.seqlen_q = common.seqlen_k = args.rows;
    common.cu_seqlens_q = common.cu_seqlens_k = args.cu_seqlens;
    common.max_seqlen_q = common.max_seqlen_k = args.max_seqlen;
    common.window_left = common.window_right = -1;
    common.scale = layer.scale;
    common.threads = args.threads;
    call.output = work.context;
    call.output_stride[1] = head_dim;
    call.output_stride[2] = hidden;
    call.lse = reinterpret_cast<float*>(work.lse);
    call.lse_stride[1] = args.rows;
    return kernels().attention_forward(call);
  }

  Status add_layer_norm(const EncoderNorm& norm, const void* input, const void* residual,
                        void* output) const {
    AddLayerNormArgs call = {};
    call.dtype = layer.dtype;
    call.parameter_dtype = layer.parameter_dtype;
    call.input = input;
    call.residual = residual;
    call.weight = norm.weight;
    call.bias = norm.bias;
    call.output = output;
    call.rows = args.rows;
    call.columns = call.input_stride = call.residual_stride = layer.hidden;
    call.eps = norm.eps;
    call.threads = args.threads;
    return kernels().add_layer_norm(call);
  }

  // input and output do not overlap: the output serves as working space until its values come.
  Status operator()(const void* input, void* output) const {
    const int64_t hidden = layer.hidden, wide = layer.intermediate;
    const Dtype state = layer.dtype, inner = layer.inner_dtype;
    Status status = linear(0, input, state, hidden, work.wide, inner, 3 * hidden);
    if (status.code == kOk) status = attention();
    if (status.code == kOk) status = linear(1, work.context, inner, hidden, output, state, hidden);
    if (status.code == kOk) status = add_layer_norm(layer.norms[0], output, input, work.attended);
    if (status.code == kOk)
      status = linear(2, work.attended, state, hidden, work.wide, inner, wide, layer.activation);
    if (status.code == kOk) status = linear(3, work.wide, inner, wide, work.context, state, hidden);
    if (status.code != kOk) return status;
    return add_layer_norm(layer.norms[1], work.context, work.attended, output);
  }
};

}  // namespace

int64_t encoder_workspace(const EncoderLayer& layer, int64_t rows) noexcept {
  return Workspace(layer, nullptr, rows).bytes;
}

Status encoder_layers(const EncoderLayersArgs& args) noexcept {
  const Workspace work(*args.layers[0], args.workspace, args.rows);
  const void* input = args.input;
  for (int64_t k = 0; k < args.count; ++k) {
    void* output = (args.count - k) % 2 == 1 ? args.output : work.states;  // the last one's: output
    const Status status = Run{args, *args.layers[k], work}(input, output);
    if (status.code != kOk) return status;
    input = output;
  }
  return {};
}

}  // namespace ctxfast
