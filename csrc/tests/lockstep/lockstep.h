// Runs unmodified CUDA kernels on the CPU, a block at a time, every thread a fiber, deterministically.
//
// For tests: a .cu file is compiled by g++ with this header in front of it, its launcher called on host memory:
//
//   g++ -std=c++17 -O1 -g1 -fPIC -fsanitize=thread,alignment,bounds -fno-sanitize-recover=all --param tsan-instrument-func-entry-exit=0
//       "-D__launch_bounds__(...)=" -I$CUDA_HOME/include -Icsrc -include csrc/tests/lockstep/lockstep.h -x c++ -c csrc/operation.cu
//   g++ -shared operation.o -o operation.so            # no -fsanitize here: the header itself is the sanitizers' runtime
//
// (tests/csrc/lockstep.py does it for pytest.) A launcher launches with cudaLaunchKernelEx: g++ cannot parse <<<>>>.
//
// What it stands in for: threadIdx and its like, __shared__ (also `extern __shared__ ... dynamic_shared[]`, by this name), barriers, shuffles,
// votes, mma, movmatrix and ldmatrix (matrix.h; csrc/mma.cuh calls them), intrinsics (intrinsics.h), cudaLaunchKernelEx and the little of the
// runtime's API that launchers use (runtime.h). Half types and 8-bit floats are CUDA's own headers, which round on the host as on the device.
//
// What it checks, everywhere in the kernel, by means of the compiler's instrumentation (memory.h):
//   - every access to global memory lies in a buffer that was named with lockstep_buffer, and writes in one that may be written
//   - every access is aligned to its width, every array index is within its array
//   - a collective is reached by all lanes that it names, a barrier by all threads; a deadlock is found at once
//   - how often each byte of a buffer was read and written: lockstep_counts
// Shared memory is filled with 0xff, which is NaN, before each block. A fault ends the launch: cudaLaunchKernelEx returns cudaErrorAssert, and
// lockstep_error says what happened; without a caller that asks, set LOCKSTEP_ABORT=1 in the environment, and the process aborts.
// lockstep_order(1) steps the threads in reverse: a result that differs wants for a barrier.
#pragma once

#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#define __CUDA_RUNTIME_H__  // of cuda_runtime.h, all that is wanted is what follows
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include "fibers.h"
#include "intrinsics.h"
#include "matrix.h"
#include "memory.h"
#include "runtime.h"
