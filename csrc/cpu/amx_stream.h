// Products of blocks that amx_pack.h has split, half a step at a time: sums stay in the matrix
// tiles while the caller does other work between the halves, which vector units do while the tiles
// multiply.
#pragma once

#include "cpu/amx_split_block.h"

#if defined(CTXFAST_AMX)

CTXFAST_NAMESPACE_BEGIN

// A block of rows times `count` neighbouring blocks of columns, at most kSplitBlock columns of
// `out` each.
struct SplitJob {
  const char *rows, *columns;
  int64_t column_bytes;  // from one block of columns to the next
  int64_t steps, count;
  float* out;
  int64_t stride;  // in floats
  bool starts;     // nothing is added to
};

class SplitStream {
 public:
  static constexpr int kMostJobs = 2;

  void add(const SplitJob& job) {
    jobs_[jobs++] = job;
    halves_ += 2 * job.steps * job.count;
  }
  // To be done in the course of `work` units of other work.
  void start(int64_t work) {
    if (jobs == 0) return;
    rate_ = ((halves_ << kFraction) + work - 1) / work;
    enter();
    load_first<>(rows_, columns_);
    start_sums();
  }
  // `work` units are done.
  CTXFAST_INLINE void advance(int64_t work) {
    for (due_ += work * rate_; due_ >> kFraction; due_ -= 1 << kFraction) half();
  }
  void finish() {
    while (left_ != 0) half();
  }

 private:
  static constexpr int kFraction = 16;
  SplitJob jobs_[kMostJobs];
  int jobs = 0, job_ = 0;
  int64_t halves_ = 0, rate_ = 0, due_ = 0;
  const char *rows_ = nullptr, *columns_ = nullptr;
  int64_t left_ = 0, block_ = 0;  // steps of the block, and its index
  bool second_ = false;

  void enter() {
    const SplitJob& job = jobs_[job_];
    rows_ = job.rows;
    columns_ = job.columns + block_ * job.column_bytes;
    left_ = job.steps;
  }
  void start_sums() {
    const SplitJob& job = jobs_[job_];
    if (job.starts) {
      clear_sums();
    } else {
      load_sums(job.out + block_ * kSplitBlock, job.stride * int64_t(sizeof(float)));
    }
  }

  CTXFAST_INLINE void half() {
    if (left_ == 0) return;
    if (!second_) {
      multiply_then_load_rows<1>(rows_);
      multiply_then_load_columns<1>(columns_);
      multiply_then_load_rows<0>(rows_);
      second_ = true;
      return;
    }
    second_ = false;
    multiply_then_load_columns<2>(columns_);
    multiply_then_load_columns<0>(columns_);
    if (--left_ == 0) return turn();
    rows_ += kSplitStepBytes<>;
    columns_ += kSplitStepBytes<>;
    multiply_then_load_first<>(rows_, columns_);
  }

  // From the end of a block to the next one; behind the last, what is loaded is not used.
  CTXFAST_NOINLINE void turn() {
    const SplitJob& job = jobs_[job_];
    float* sums = job.out + block_ * kSplitBlock;
    if (++block_ == job.count) block_ = 0, ++job_;
    if (job_ != jobs) enter();
    multiply_then_load_first<>(rows_, columns_);
    store_sums(sums, job.stride * int64_t(sizeof(float)));
    if (job_ != jobs) start_sums();
  }
};

CTXFAST_NAMESPACE_END

#endif
