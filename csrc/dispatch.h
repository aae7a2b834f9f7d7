// Choice of the instruction set.
#pragma once

#include "cpu/kernel_table.h"

namespace ctxfast {

struct InstructionSet {
  const char* name;
  const KernelTable* kernels;
};

// Those that this binary holds and this CPU runs, in rising order; `count` is set.
const InstructionSet* available_instruction_sets(int* count) noexcept;

// The chosen one: the highest available, or the highest not above the environment variable
// CTXFAST_CPU_ISA.
const InstructionSet& instruction_set() noexcept;

// Chooses by name; false if it is not available.
bool set_instruction_set(const char* name) noexcept;

inline const KernelTable& kernels() noexcept { return *instruction_set().kernels; }

}  // namespace ctxfast
