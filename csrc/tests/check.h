// A test is a main that returns `failures()`; every CHECK that does not hold says where.
#pragma once

#include <cstdio>

inline int& failures() {
  static int count = 0;
  return count;
}

#define CHECK(condition)                                                              \
  do {                                                                                \
    if (!(condition)) {                                                               \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);    \
      failures() = 1;                                                                 \
    }                                                                                 \
  } while (false)
