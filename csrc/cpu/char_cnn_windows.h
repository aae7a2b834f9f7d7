// What forward and backward of the character convolutions share: packed filters, and the maximum of
// a panel of filters over the windows of one token.
//
// The rows of the matrix of windows overlap: row p begins at character p of the token, so the
// embedded characters [characters, channels] are that matrix with a row stride of `channels`, and
// nothing is copied. A token's end is one repeated padding character; windows inside it are all
// equal, and only the first of them is computed.
#pragma once

#include "cpu/char_cnn.h"
#include "cpu/matrix_tile.h"
#include "cpu/parallel.h"

CTXFAST_NAMESPACE_BEGIN

// One panel: filters of one width, kTileColumns vectors of them.
template <typename T>
constexpr int64_t kPanel = int64_t(kTileColumns) * kLanes<T>;

struct Panel {
  int64_t group, first;   // its group, its first filter there
  int64_t filter;         // its first filter among all
  int64_t count;          // of filters, at most kPanel
  int64_t depth;          // width * channels
  int64_t weight_offset;  // of its first filter in the operator's weight
  int64_t packed_offset;  // of its packed form [depth, kPanel]
};

template <typename T>
struct Panels {
  int64_t count = 0, filters = 0, packed = 0;
  const CharCnnArgs* args;

  explicit Panels(const CharCnnArgs& a) : args(&a) {
    for (int32_t g = 0; g < a.groups; ++g) {
      count += (a.counts[g] + kPanel<T> - 1) / kPanel<T>;
      filters += a.counts[g];
      packed += (a.counts[g] + kPanel<T> - 1) / kPanel<T> * kPanel<T> * a.widths[g] * a.channels;
    }
  }

  template <typename Body>
  CTXFAST_INLINE void for_each(const Body& body) const {
    Panel panel = {};
    int64_t group_weight = 0, group_filter = 0;
    for (int32_t g = 0; g < args->groups; ++g) {
      panel.group = g;
      panel.depth = args->widths[g] * args->channels;
      for (int64_t first = 0; first < args->counts[g]; first += kPanel<T>) {
        panel.first = first;
        panel.filter = group_filter + first;
        panel.count = args->counts[g] - first < kPanel<T> ? args->counts[g] - first : kPanel<T>;
        panel.weight_offset = group_weight + first * panel.depth;
        body(panel);
        panel.packed_offset += panel.depth * kPanel<T>;
      }
      group_weight += args->counts[g] * panel.depth;
      group_filter += args->counts[g];
    }
  }
};

template <typename Storage, typename T = Compute<Storage> >
CTXFAST_INLINE void pack_panel(const CharCnnArgs& args, const Panel& panel, T* packed) {
  const Storage* weight = static_cast<const Storage*>(args.weight) + panel.weight_offset;
  for (int64_t k = 0; k < panel.depth; ++k)
    for (int64_t f = 0; f < kPanel<T>; ++f)
      packed[k * kPanel<T> + f] = f < panel.count ? to_compute(weight[f * panel.depth + k]) : T(0);
}

CTXFAST_INLINE int64_t character_at(const CharCnnArgs& args, int64_t token, int64_t place) {
  const int64_t index = token * args.characters + place;
  return args.wide_ids ? static_cast<const int64_t*>(args.ids)[index]
                       : static_cast<const int32_t*>(args.ids)[index];
}

// Length of the token without its repeated last character: windows from here on are equal.
CTXFAST_INLINE int64_t distinct_characters(const CharCnnArgs& args, int64_t token) {
  int64_t length = args.characters - 1;
  const int64_t last = character_at(args, token, length);
  while (length > 0 && character_at(args, token, length - 1) == last) --length;
  return length;
}

CTXFAST_INLINE int64_t windows_of(const CharCnnArgs& args, int64_t distinct, int64_t width) {
  const int64_t all = args.characters - width + 1;
  return distinct + 1 < all ? distinct + 1 : all;
}

template <typename Storage, typename T = Compute<Storage> >
CTXFAST_INLINE void embed_token(const CharCnnArgs& args, int64_t token, int64_t characters, T* x) {
  for (int64_t m = 0; m < characters; ++m) {
    const Storage* row =
        static_cast<const Storage*>(args.embedding) + character_at(args, token, m) * args.channels;
    for (int64_t c = 0; c < args.channels; ++c) x[m * args.channels + c] = to_compute(row[c]);
  }
}

template <typename T, bool kPlace>
struct Best {
  Vec<T> value[kTileColumns];
  Vec<T> place[kTileColumns];  // the first window with the maximum, if kPlace
};

template <typename T, bool kPlace, int kRows>
CTXFAST_INLINE void best_of_tile(const T* x, int64_t channels, const T* packed, int64_t depth,
                                 int64_t start, Best<T, kPlace>& best) {
  Vec<T> sum[kRows][kTileColumns] = {};
  multiply_tile<ScalarArithmetic<T>, kRows, kTileColumns>(x + start * channels, channels, packed,
                                                          kPanel<T>, kLanes<T>, depth, sum);
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kTileColumns; ++c) {
      // A NaN is taken and kept.
      const Mask<T> take = (sum[r][c] > best.value[c]) | (sum[r][c] != sum[r][c]);
      best.value[c] = take ? sum[r][c] : best.value[c];
      if constexpr (kPlace) best.place[c] = take ? splat<T>(T(start + r)) : best.place[c];
    }
}

// The maxima of a panel over the first `windows` windows of embedded characters x, without bias.
template <typename T, bool kPlace>
CTXFAST_INLINE void best_windows(const T* x, int64_t channels, const T* packed, int64_t depth,
                                 int64_t windows, Best<T, kPlace>& best) {
  for (int c = 0; c < kTileColumns; ++c) {
    best.value[c] = splat<T>(T(-__builtin_huge_val()));
    best.place[c] = Vec<T>{};
  }
  for (int64_t start = 0; start < windows;) {
    const int rows = next_rows(windows - start);
    switch (rows) {
      case 1:
        best_of_tile<T, kPlace, 1>(x, channels, packed, depth, start, best);
        break;
      case 2:
        best_of_tile<T, kPlace, 2>(x, channels, packed, depth, start, best);
        break;
      case 3:
        best_of_tile<T, kPlace, 3>(x, channels, packed, depth, start, best);
        break;
      case 4:
        best_of_tile<T, kPlace, 4>(x, channels, packed, depth, start, best);
        break;
      case 5:
        best_of_tile<T, kPlace, 5>(x, channels, packed, depth, start, best);
        break;
      default:
        best_of_tile<T, kPlace, 6>(x, channels, packed, depth, start, best);
    }
    start += rows;
  }
}

// All ids are checked before anything is read.
CTXFAST_INLINE Status check_characters(const CharCnnArgs& args) {
  Status status;
  for (int64_t token = 0; token < args.tokens; ++token)
    for (int64_t m = 0; m < args.characters; ++m) {
      const int64_t id = character_at(args, token, m);
      if (id < 0 || id >= args.vocabulary) {
        status.code = kIndexOutOfRange;
        status.value = id;
        return status;
      }
    }
  return status;
}

CTXFAST_NAMESPACE_END
