// The LSTM's arguments from the flat list of integers that ctxfast/ops/_native_lstm_cuda.py makes.
#pragma once

#include <type_traits>

#include "cuda/lstm.h"

namespace ctxfast {
namespace cuda {

constexpr int kLstmSharedArguments = 8, kLstmDirectionArguments = 20;

inline Lstm lstm_arguments(const int64_t* values, double cell_clip, double proj_clip) {
  Lstm args = {};
  args.count = int(values[0]);
  args.batch = int(values[1]);
  args.steps = int(values[2]);
  args.hidden = int(values[3]);
  args.features = int(values[4]);
  args.output_stride = values[5];
  args.lengths = reinterpret_cast<const int64_t*>(values[6]);
  args.order = reinterpret_cast<const int64_t*>(values[7]);
  args.cell_clip = float(cell_clip);
  args.proj_clip = float(proj_clip);
  for (int k = 0; k < args.count; ++k) {
    const int64_t* v = values + kLstmSharedArguments + k * kLstmDirectionArguments;
    LstmDirection& d = args.directions[k];
    int i = 0;
    const auto next = [&](auto& address) {
      address = reinterpret_cast<std::decay_t<decltype(address)>>(v[i++]);
    };
    next(d.gates), next(d.weight_hh), next(d.weight_hr), next(d.h0), next(d.c0), next(d.mask);
    next(d.output), next(d.h), next(d.c), next(d.saved_gates), next(d.cells), next(d.projected);
    next(d.grad_output), next(d.grad_h), next(d.grad_c), next(d.grad_gates);
    next(d.grad_projected), next(d.grad_h0), next(d.grad_c0);
    d.reverse = int(v[i]);
  }
  return args;
}

}  // namespace cuda
}  // namespace ctxfast
