// The instruction set that a kernel source is compiled for.
//
// setup.py compiles every source of this directory several times, with -DCTXFAST_ISA=<name> and the
// matching -march. Everything in these sources lives in namespace ctxfast::<name>, so the copies do
// not collide. A symbol shared between the copies would be kept once by the linker, in any one of
// them, perhaps in one that the CPU cannot run; therefore kernel sources use no templates or inline
// functions of the standard library.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifndef CTXFAST_ISA
#error "CTXFAST_ISA must name the instruction set, one of those in setup.py"
#endif

#define CTXFAST_NAMESPACE_BEGIN \
  namespace ctxfast {           \
  namespace CTXFAST_ISA {
#define CTXFAST_NAMESPACE_END \
  }                           \
  }

#define CTXFAST_INLINE inline __attribute__((always_inline))
#define CTXFAST_NOINLINE __attribute__((noinline))

// Each instruction set has what is below it.
#if defined(CTXFAST_ISA_AMX)
#define CTXFAST_AMX 1
#endif
#if defined(CTXFAST_AMX) || defined(CTXFAST_ISA_AVX512_BF16)
#define CTXFAST_AVX512_BF16 1
#endif
#if defined(CTXFAST_AVX512_BF16) || defined(CTXFAST_ISA_AVX512_VNNI)
#define CTXFAST_AVX512_VNNI 1
#endif
#if defined(CTXFAST_AVX512_VNNI) || defined(CTXFAST_ISA_AVX512)
#define CTXFAST_AVX512 1
#define CTXFAST_VECTOR_BYTES 64
#elif defined(CTXFAST_ISA_AVX2)
#define CTXFAST_AVX2 1
#define CTXFAST_VECTOR_BYTES 32
#else
#define CTXFAST_VECTOR_BYTES 16
#endif

#if defined(CTXFAST_AVX512) || defined(CTXFAST_AVX2)
#include <immintrin.h>
#endif
