// Whether tensors share memory, from addresses, sizes and strides alone, as pab_kernels/ops/overlap.py has it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

namespace pab {

constexpr int kMaxRank = 5;

struct Memory {
  std::uintptr_t begin = 0;
  std::int64_t item = 1;  // bytes of an element
  int rank = 0;
  std::int64_t sizes[kMaxRank] = {};
  std::int64_t strides[kMaxRank] = {};

  // Bytes from the first element to the end of the last one.
  std::int64_t extent() const {
    std::int64_t last = 0;
    for (int dim = 0; dim < rank; ++dim) {
      if (sizes[dim] == 0) return 0;
      last += (sizes[dim] - 1) * strides[dim];
    }
    return item * (1 + last);
  }
};

inline bool meet(const Memory& a, const Memory& b) {
  const std::int64_t a_extent = a.extent(), b_extent = b.extent();
  if (a_extent == 0 || b_extent == 0) return false;
  return a.begin < b.begin + static_cast<std::uintptr_t>(b_extent) && b.begin < a.begin + static_cast<std::uintptr_t>(a_extent);
}

inline bool same(const Memory& a, const Memory& b) {
  if (a.begin != b.begin || a.rank != b.rank) return false;
  for (int dim = 0; dim < a.rank; ++dim) {
    if (a.sizes[dim] > 1 && a.strides[dim] != b.strides[dim]) return false;
  }
  return true;
}

// A few items in order. What std::sort does beyond sixteen of them makes g++ warn of arrays that are shorter.
template <typename Item, typename Before>
void sort_few(Item* items, int count, Before before) {
  for (int end = 1; end < count; ++end) {
    for (int i = end; i > 0 && before(items[i], items[i - 1]); --i) std::swap(items[i], items[i - 1]);
  }
}

// Each stride, from the least on, is to reach beyond all that the smaller ones span.
inline bool overlaps_itself(const Memory& m) {
  std::array<std::pair<std::int64_t, std::int64_t>, kMaxRank> steps{};
  int count = 0;
  for (int dim = 0; dim < m.rank; ++dim) {
    if (m.sizes[dim] == 0) return false;
    if (m.sizes[dim] > 1) steps[count++] = {m.strides[dim], m.sizes[dim]};
  }
  sort_few(steps.data(), count, [](const auto& x, const auto& y) { return x.first < y.first; });
  std::int64_t reach = 1;
  for (int i = 0; i < count; ++i) {
    if (steps[i].first < reach) return true;
    reach += steps[i].first * (steps[i].second - 1);
  }
  return false;
}

// A stride in bytes, and the least and the greatest multiple of it.
struct Term {
  std::int64_t stride, least, most;
};

// Whether a sum of multiples of the strides, the greatest first, is this distance; true too where no steps are `left`.
inline bool reaches(std::int64_t distance, const Term* terms, const Term* end, int& left) {
  if (terms == end) return distance == 0;
  std::int64_t low = 0, high = 0;
  for (const Term* rest = terms + 1; rest != end; ++rest) low += rest->stride * rest->least, high += rest->stride * rest->most;
  const auto floor_div = [](std::int64_t a, std::int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); };
  const std::int64_t last = std::min(terms->most, floor_div(distance - low, terms->stride));
  for (std::int64_t n = std::max(terms->least, -floor_div(high - distance, terms->stride)); n <= last; ++n) {
    if (--left < 0 || reaches(distance - n * terms->stride, terms + 1, end, left)) return true;
  }
  return false;
}

// Whether a byte belongs to both.
inline bool overlap(const Memory& a, const Memory& b) {
  if (!meet(a, b)) return false;
  std::array<Term, 2 * (kMaxRank + 1)> terms{};
  int count = 0;
  const auto add = [&](std::int64_t stride, std::int64_t least, std::int64_t most) {
    if (stride == 0) return;
    for (int i = 0; i < count; ++i) {
      if (terms[i].stride == stride) {
        terms[i].least += least, terms[i].most += most;
        return;
      }
    }
    terms[count++] = {stride, least, most};
  };
  for (int dim = 0; dim < a.rank; ++dim) add(a.strides[dim] * a.item, 0, a.sizes[dim] - 1);
  for (int dim = 0; dim < b.rank; ++dim) add(b.strides[dim] * b.item, 1 - b.sizes[dim], 0);
  add(1, 0, a.item - 1);
  add(1, 1 - b.item, 0);
  sort_few(terms.data(), count, [](const Term& x, const Term& y) { return x.stride > y.stride; });
  int left = 10000;
  return reaches(static_cast<std::int64_t>(b.begin - a.begin), terms.data(), terms.data() + count, left);
}

}  // namespace pab
