# pab_host: the module pab_kernels._host, the planners for Python.

if(NOT PAB_PYTHON_INCLUDE)
  return()
endif()

list(TRANSFORM PAB_OPS REPLACE "(.+)" "python/\\1_host.cpp" OUTPUT_VARIABLE bindings)
add_library(pab_host MODULE python/host.cpp ${bindings})
target_include_directories(pab_host SYSTEM PRIVATE ${PAB_PYTHON_INCLUDE})
target_link_libraries(pab_host PRIVATE pab_plans)
set_target_properties(pab_host PROPERTIES PREFIX "" OUTPUT_NAME _host SUFFIX "${PAB_HOST_SUFFIX}")
install(TARGETS pab_host LIBRARY DESTINATION . COMPONENT python)
