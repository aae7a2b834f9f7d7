// Products of bfloat16 matrices that advance by one tile product at a time: sums stay in matrix
// tiles while the caller does other work in between, which vector units do while the tiles
// multiply. Finer pieces overlap better: the processor looks ahead a few hundred instructions.
#pragma once

#include "cpu/amx.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

// C [32, 16 columns] = A B, or added to what lies there; all distances are in bytes, and memory
// reaches to the end of every tile. Step k of the depth, 32 elements, reads
//   A: two tiles of 16 rows, 64 bytes apart, at a + kTileStep k
//   B: 16 rows b_row apart, at b + k b_step, the next 16 columns b_column further
struct ProductJob {
  const char *a, *b;
  int64_t b_row, b_step, b_column;
  int64_t steps;    // at most 2: these tiles of A stay in registers
  int64_t columns;  // in tiles
  char* c;
  int64_t c_row;
  bool starts;  // nothing is added to
};
constexpr int64_t kTileBytes = kMatrixRows * kMatrixBytes;
constexpr int64_t kTileStep = 2 * kTileBytes;

class ProductStream {
 public:
  static constexpr int kMostJobs = 6;

  // A product of any depth. Jobs are written element by element: a wide copy of what was just
  // written waits until it has left the store buffer, behind all results of the tiles.
  CTXFAST_INLINE void add(const ProductJob& whole) {
    for (int64_t done = 0; done < whole.steps; done += 2) {
      ProductJob& job = jobs_[count_++];
      job.a = whole.a + done * kTileStep;
      job.b = whole.b + done * whole.b_step;
      job.b_row = whole.b_row;
      job.b_step = whole.b_step;
      job.b_column = whole.b_column;
      job.steps = whole.steps - done < 2 ? 1 : 2;
      job.columns = whole.columns;
      job.c = whole.c;
      job.c_row = whole.c_row;
      job.starts = whole.starts && done == 0;
      left_ += 2 * job.steps * job.columns;
    }
  }
  // To be done in the course of `work` units of other work.
  void start(int64_t work) { rate_ = (left_ + work - 1) / work; }
  // A unit of other work is done.
  CTXFAST_INLINE void advance() {
    for (int64_t k = 0; k < rate_; ++k) multiply();
  }
  void finish() {
    while (left_ != 0) multiply();
  }

 private:
  ProductJob jobs_[kMostJobs];
  int count_ = 0, job_ = -1;
  int64_t left_ = 0;  // tile products
  // Not side by side: the two are then never loaded as one, for the reason above.
  const char* b_ = nullptr;
  int64_t rate_ = 0;
  char* c_ = nullptr;
  int turn_ = 0;         // of a column's products
  int64_t columns_ = 0;  // left of the job

  CTXFAST_INLINE void multiply() {
    if (left_ == 0) return;
    --left_;
    switch (turn_) {
      case 0:
        begin_column();
        multiply_matrix<0, 4, 2>();
        turn_ = 1;
        break;
      case 1:
        multiply_matrix<1, 5, 2>();
        turn_ = 2;
        if (jobs_[job_].steps == 1) end_column();
        break;
      case 2:
        multiply_matrix<0, 6, 3>();
        turn_ = 3;
        break;
      default:
        multiply_matrix<1, 7, 3>();
        end_column();
    }
  }

  CTXFAST_INLINE void begin_column() {
    if (columns_ == 0) next_job();
    const ProductJob& job = jobs_[job_];
    if (job.starts) {
      clear_matrix<0>();
      clear_matrix<1>();
    } else {
      load_matrix<0>(c_, job.c_row);
      load_matrix<1>(c_ + kMatrixRows * job.c_row, job.c_row);
    }
    load_matrix<2>(b_, job.b_row);
    if (job.steps > 1) load_matrix<3>(b_ + job.b_step, job.b_row);
  }
  CTXFAST_NOINLINE void next_job() {
    const ProductJob& job = jobs_[++job_];
    columns_ = job.columns;
    b_ = job.b;
    c_ = job.c;
    load_matrix<4>(job.a, kMatrixBytes);
    load_matrix<5>(job.a + kTileBytes, kMatrixBytes);
    if (job.steps == 1) return;
    load_matrix<6>(job.a + kTileStep, kMatrixBytes);
    load_matrix<7>(job.a + kTileStep + kTileBytes, kMatrixBytes);
  }
  CTXFAST_INLINE void end_column() {
    const ProductJob& job = jobs_[job_];
    store_matrix<0>(c_, job.c_row);
    store_matrix<1>(c_ + kMatrixRows * job.c_row, job.c_row);
    --columns_;
    b_ += job.b_column;
    c_ += kMatrixBytes;
    turn_ = 0;
  }
};

CTXFAST_NAMESPACE_END

#endif
