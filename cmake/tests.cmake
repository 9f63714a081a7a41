# Tests are programs. For an operation they are those of these that exist:
#   csrc/tests/<op>_plan_test.cpp      the planner
#   csrc/tests/<op>_lockstep_test.cpp  the kernel itself, compiled for the CPU against csrc/tests/lockstep
#   csrc/tests/<op>_device_test.cu     the kernel on a device; exit status 77 where there is none

foreach(op IN LISTS PAB_OPS)
  foreach(kind plan lockstep)
    set(source csrc/tests/${op}_${kind}_test.cpp)
    if(EXISTS ${CMAKE_SOURCE_DIR}/${source})
      add_executable(${op}_${kind}_test ${source})
      target_link_libraries(${op}_${kind}_test PRIVATE pab_plans)
      add_test(NAME ${op}_${kind} COMMAND ${op}_${kind}_test)
    endif()
  endforeach()
  set(source csrc/tests/${op}_device_test.cu)
  if(PAB_HAS_CUDA AND EXISTS ${CMAKE_SOURCE_DIR}/${source})
    add_executable(${op}_device_test ${source})
    target_link_libraries(${op}_device_test PRIVATE pab_kernels CUDA::cudart_static)
    add_test(NAME ${op}_device COMMAND ${op}_device_test)
    set_tests_properties(${op}_device PROPERTIES SKIP_RETURN_CODE 77)
  endif()
endforeach()
