#pragma once

#include <cstdint>
#include <vector>

namespace dcext {

/** How a stream reads: dcext/policy/timeline.py, which has the formula, too. */
struct Reads {
  double bytes_per_s;   // of the disk
  int64_t slots;        // memory to read into, at least 1
  int64_t slot_nbytes;  // of each, at least 1
};

/** A layer of a pass: what it computes, and what it reads from the disk for that, ahead of its use. */
struct Layer {
  double compute_s;
  int64_t read_nbytes;  // 0 for what is in memory
};

/** Adds up the time of forward passes. One thread at a time; allocates nothing after it was made. */
class Timeline {
 public:
  explicit Timeline(const Reads& reads) : reads_(reads), released_(reads.slots) {}

  /** Seconds of a pass among equal ones. */
  double pass_s(const std::vector<Layer>& layers);

  /** Reads and layers that `pass_s` goes through for one that reads so many bytes. */
  int64_t steps(int64_t read_nbytes) const {
    const int64_t pieces = (read_nbytes + reads_.slot_nbytes - 1) / reads_.slot_nbytes;
    return pieces > 1 ? pieces : 1;
  }

 private:
  Reads reads_;
  std::vector<double> released_;  // when what lay in each slot was used
};

}  // namespace dcext
