// Reusable working memory of the calling thread.
#pragma once

#include <cstddef>

namespace ctxfast {

// A thread may hold one block of each kind at a time.
enum ScratchKind { kKernelScratch, kPlanScratch, kScratchKinds };

// At least `bytes` bytes aligned to 4096, or nullptr. The memory stays the thread's own and is
// handed out again by the next call for the same kind, so a kernel calls this once and divides what
// it gets. Contents are arbitrary.
void* thread_scratch(size_t bytes, ScratchKind kind = kKernelScratch) noexcept;

// Gives the calling thread's blocks back, until its next call for them.
void release_scratch() noexcept;

// Asks for large pages where the system gives them on request: fresh memory then costs a third, and
// long streams fewer look-ups. Changes no contents.
void advise_large_pages(void* memory, size_t bytes) noexcept;

// From now on fills every block that is handed out with 0xff bytes (NaN in every floating type):
// for tests.
void set_poison_scratch(bool enabled) noexcept;

// Whether this process was forked from one that had already used several threads. OpenMP's threads
// do not survive a fork, and asking for them again would wait for ever.
bool must_run_serially() noexcept;

// Remembers that this process uses several threads.
void note_parallel_region() noexcept;

}  // namespace ctxfast
