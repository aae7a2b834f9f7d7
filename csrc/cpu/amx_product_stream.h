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
constexpr int64_t kTileStep = 2 * kTileBytes;

class ProductJobs {
 public:
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
      products_ += 2 * job.steps * job.columns;
    }
  }

 private:
  friend class ProductStream;
  static constexpr int kMostJobs = 6;
  ProductJob jobs_[kMostJobs];
  int count_ = 0;
  int64_t products_ = 0;
};

// What it counts stays in registers: results of tiles fill the store buffer.
class ProductStream {
 public:
  // To be done in the course of `work` units of other work.
  CTXFAST_INLINE ProductStream(const ProductJobs& jobs, int64_t work)
      : job_(jobs.jobs_ - 1), left_(jobs.products_), rate_((jobs.products_ + work - 1) / work) {}
  // A unit of other work is done.
  CTXFAST_INLINE void advance() {
    for (int64_t k = 0; k < rate_; ++k) multiply();
  }
  CTXFAST_INLINE void finish() {
    while (left_ != 0) multiply();
  }

 private:
  const ProductJob* job_;
  int64_t left_, rate_;  // tile products
  int turn_ = 0;         // of a column's products
  int64_t columns_ = 0;  // left of the job
  const char* b_ = nullptr;
  char* c_ = nullptr;

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
        if (job_->steps == 1) end_column();
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
    if (columns_ == 0) begin_job();
    if (job_->starts) {
      clear_matrix<0>();
      clear_matrix<1>();
    } else {
      load_matrix<0>(c_, job_->c_row);
      load_matrix<1>(c_ + kMatrixRows * job_->c_row, job_->c_row);
    }
    load_matrix<2>(b_, job_->b_row);
    if (job_->steps > 1) load_matrix<3>(b_ + job_->b_step, job_->b_row);
  }
  CTXFAST_INLINE void begin_job() {
    ++job_;
    columns_ = job_->columns;
    b_ = job_->b;
    c_ = job_->c;
    load_matrix<4>(job_->a, kMatrixBytes);
    load_matrix<5>(job_->a + kTileBytes, kMatrixBytes);
    if (job_->steps == 1) return;
    load_matrix<6>(job_->a + kTileStep, kMatrixBytes);
    load_matrix<7>(job_->a + kTileStep + kTileBytes, kMatrixBytes);
  }
  CTXFAST_INLINE void end_column() {
    store_matrix<0>(c_, job_->c_row);
    store_matrix<1>(c_ + kMatrixRows * job_->c_row, job_->c_row);
    --columns_;
    b_ += job_->b_column;
    c_ += kMatrixBytes;
    turn_ = 0;
  }
};

CTXFAST_NAMESPACE_END

#endif
