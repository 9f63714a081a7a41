// pab_kernels._host: the planners, for Python. Each operation binds its own in <op>_host.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include "../csrc/plan.h"

namespace pab {

void bind_broadcast_residual(pybind11::module_& module);
void bind_quantize(pybind11::module_& module);
void bind_short_attention(pybind11::module_& module);

// A pointer of this address: planners look at alignment alone.
inline void* address(std::uintptr_t value) { return reinterpret_cast<void*>(value); }

}  // namespace pab
