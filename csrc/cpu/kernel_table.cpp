#include "cpu/kernel_table.h"

#include "cpu/isa.h"

CTXFAST_NAMESPACE_BEGIN

extern const KernelTable kKernels;
const KernelTable kKernels = {
#define CTXFAST_ENTRY(name, Args) name,
    CTXFAST_CPU_OPERATORS(CTXFAST_ENTRY)
#undef CTXFAST_ENTRY
};

CTXFAST_NAMESPACE_END
