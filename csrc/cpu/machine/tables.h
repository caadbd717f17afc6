// Tables of which a task needs a few rows: which ones, and where their gradients go.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "layout.h"

namespace fm::machine {

// What a task leaves of its tables' gradients for the caller: for every table the number of rows,
// the rows, and their gradients. `at` is where in a task's record.
template <class S>
class TableRecord {
 public:
  TableRecord(const Layout& at, S* records, i64 task) : base_(records + task * at.record) {}
  i64* numbers(i64 offset) const { return reinterpret_cast<i64*>(base_ + offset); }
  S* values(i64 offset) const { return base_ + offset; }

 private:
  S* base_;
};

// Numbers the rows that the tasks of a group name, in the order in which they are named.
class TableRows {
 public:
  TableRows(const Machine& m) : m_(m), known_(m.tables.size()), rows_(m.tables.size() * size_t(m.lanes)) {
    for (size_t t = 0; t < m.tables.size(); ++t) known_[t].assign(size_t(m.tables[t].rows), -1);
  }

  const std::vector<i64>& rows(size_t table, i64 lane) const {
    return rows_[table * size_t(m_.lanes) + size_t(lane)];
  }

  // ints: of the support and the query set, null where there is none. False where an index is out
  // of range.
  bool number(i64* const (&ints)[2]) {
    bool good = true;
    for (size_t t = 0; t < m_.tables.size(); ++t)
      for (i64 l = 0; l < m_.lanes; ++l) good = number(t, l, ints) && good;
    return good;
  }

 private:
  bool number(size_t table, i64 lane, i64* const (&ints)[2]) {
    const i64 limit = m_.tables[table].rows, L = m_.lanes;
    std::vector<std::int32_t>& known = known_[table];
    std::vector<i64>& rows = rows_[table * size_t(L) + size_t(lane)];
    rows.clear();
    bool good = true;
    for (int which = 0; which < 2; ++which) {
      if (!ints[which]) continue;
      for (const Numbered& n : (which ? m_.query : m_.support).numbered) {
        if (size_t(n.table) != table) continue;
        i64* to = ints[which] + n.place * L + lane;
        for (const i64 position : n.positions) {
          i64 row = ints[which][position * L + lane];
          if (n.wraps && row < 0) row += limit;
          if (row < 0 || row >= limit) good = false, row = 0;
          if (known[size_t(row)] < 0 && i64(rows.size()) == m_.tables[table].most) {
            good = false;
            *to = 0, to += L;
            continue;
          }
          if (known[size_t(row)] < 0) {
            known[size_t(row)] = std::int32_t(rows.size());
            rows.push_back(row);
          }
          *to = known[size_t(row)];
          to += L;
        }
      }
    }
    for (const i64 row : rows) known[size_t(row)] = -1;
    return good;
  }

  const Machine& m_;
  std::vector<std::vector<std::int32_t>> known_;  // of each table: the number of every row, or -1
  std::vector<std::vector<i64>> rows_;            // of each table and lane
};

}  // namespace fm::machine
