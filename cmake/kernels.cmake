# pab_kernels: the kernels and their C launchers, as objects; pab_torch: the library that registers them with torch.

set(PAB_HAS_CUDA ${PAB_CUDA})
if(PAB_CUDA STREQUAL "auto")
  include(CheckLanguage)
  check_language(CUDA)
  set(PAB_HAS_CUDA ${CMAKE_CUDA_COMPILER})
endif()
if(NOT PAB_HAS_CUDA)
  message(STATUS "nvcc is not used: kernels are not compiled")
  return()
endif()

set(CMAKE_CUDA_ARCHITECTURES OFF)  # CMake older than the architecture does not know it: the flags are written out
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

set(cuda_flags --expt-relaxed-constexpr -Xptxas=-warn-spills,-warn-lmem-usage)
foreach(arch IN LISTS PAB_CUDA_ARCHS)
  list(APPEND cuda_flags "SHELL:-gencode arch=compute_${arch},code=sm_${arch}")
endforeach()
if(PAB_WERROR)
  list(APPEND cuda_flags -Werror=all-warnings)
endif()

list(TRANSFORM PAB_OPS REPLACE "(.+)" "csrc/\\1.cu" OUTPUT_VARIABLE kernels)
add_library(pab_kernels OBJECT ${kernels})
target_compile_options(pab_kernels PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${cuda_flags}>")
target_link_libraries(pab_kernels PUBLIC pab_plans)

if(PAB_TORCH_INCLUDE)
  list(TRANSFORM PAB_OPS REPLACE "(.+)" "python/\\1_torch.cpp" OUTPUT_VARIABLE registrations)
  add_library(pab_torch MODULE ${registrations})
  # torch's headers are not ours to warn about. The stable ABI of torch 2.10: the library serves every later torch.
  target_include_directories(pab_torch SYSTEM PRIVATE ${PAB_TORCH_INCLUDE})
  target_compile_definitions(pab_torch PRIVATE TORCH_TARGET_VERSION=0x020a000000000000)
  # Needed is libtorch.so alone: every build of torch has it, and it brings libtorch_cuda.so where there is one. An empty library of that
  # name stands for it here, so that building takes torch's headers and nothing else. cudart is linked in, the driver not at all.
  file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/libtorch.cpp CONTENT "")
  add_library(libtorch SHARED ${CMAKE_BINARY_DIR}/libtorch.cpp)
  set_target_properties(libtorch PROPERTIES OUTPUT_NAME torch LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/stand-in)
  target_link_options(pab_torch PRIVATE -Wl,--no-as-needed)
  target_link_libraries(pab_torch PRIVATE pab_kernels CUDA::cudart_static libtorch)
  set_target_properties(pab_torch PROPERTIES PREFIX "" OUTPUT_NAME pab_kernels_cuda LINKER_LANGUAGE CXX BUILD_WITH_INSTALL_RPATH ON)
  install(TARGETS pab_torch LIBRARY DESTINATION . COMPONENT python)
endif()
