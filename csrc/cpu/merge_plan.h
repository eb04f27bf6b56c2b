// In which order a sweep merges its rows, and where their messages lie until then.
//
// A row is merged as soon as its messages are complete: on a sparse graph soon after its own local step, while its x
// and state are in cache. A message's place is free again once the last row that needs it is merged: a ring of a
// thousand workers gets along with a handful of places, which stay in L1 however long a tile is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../mixing.h"

namespace qgm::cpu {

struct MergePlan {
  // `row` can be merged after the local step of worker `after`; `rows` stands for after all of them.
  struct Turn {
    int32_t after, row;
  };
  std::vector<Turn> turns;     // in the order of the sweep
  std::vector<int32_t> place;  // of each worker's message, among `places`
  int32_t places = 0;

  MergePlan(const Mixing& mixing, int64_t rows) : turns(size_t(rows)), place(size_t(rows)) {
    const bool sparse = mixing.form == MixingForm::kSparse;
    const auto neighbours = [&](int32_t i, const auto& body) {
      if (!sparse) return;
      for (int32_t q = mixing.row_offsets[i]; q < mixing.row_offsets[i + 1]; ++q) body(mixing.columns[q]);
    };
    std::vector<int32_t> last_use(size_t(rows), 0);  // of each worker's message, and of its row of the tile: an `after`
    for (int32_t i = 0; i < rows; ++i) {
      int32_t after = mixing.form == MixingForm::kMean ? int32_t(rows) : i;
      neighbours(i, [&](int32_t j) { after = std::max(after, j); });
      turns[size_t(i)] = {after, i};
      last_use[size_t(i)] = std::max(last_use[size_t(i)], after);
      neighbours(i, [&](int32_t j) { last_use[size_t(j)] = std::max(last_use[size_t(j)], after); });
    }
    std::stable_sort(turns.begin(), turns.end(), [](Turn p, Turn q) { return p.after < q.after; });
    give_places(last_use);
  }

 private:
  void give_places(const std::vector<int32_t>& last_use) {
    std::vector<int32_t> ending(last_use.size()), vacant;
    for (size_t j = 0; j < ending.size(); ++j) ending[j] = int32_t(j);
    std::stable_sort(ending.begin(), ending.end(),
                     [&](int32_t p, int32_t q) { return last_use[size_t(p)] < last_use[size_t(q)]; });
    size_t ended = 0;
    for (size_t j = 0; j < place.size(); ++j) {
      if (vacant.empty()) vacant.push_back(places++);
      place[j] = vacant.back();
      vacant.pop_back();
      for (; ended < ending.size() && last_use[size_t(ending[ended])] <= int32_t(j); ++ended) {
        vacant.push_back(place[size_t(ending[ended])]);
      }
    }
  }
};

}  // namespace qgm::cpu
