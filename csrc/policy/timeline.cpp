#include "policy/timeline.h"

#include <algorithm>

namespace dcext {
namespace {

constexpr int kSettled = 3;  // passes, from which on they are equal

}  // namespace

double Timeline::pass_s(const std::vector<Layer>& layers) {
  std::fill(released_.begin(), released_.end(), 0.0);
  const double s_per_byte = 1 / reads_.bytes_per_s;
  double read_end = 0, used = 0, begin = 0;
  size_t slot = 0;
  for (int pass = 0; pass < kSettled; ++pass) {
    begin = used;
    for (const Layer& layer : layers) {
      if (layer.read_nbytes == 0) {
        used += layer.compute_s;
        continue;
      }
      const int64_t pieces = steps(layer.read_nbytes);
      const double share = 1 / static_cast<double>(pieces);
      const double read_s = static_cast<double>(layer.read_nbytes) * share * s_per_byte;
      const double compute_s = layer.compute_s * share;
      for (int64_t i = 0; i < pieces; ++i) {
        read_end = std::max(read_end, released_[slot]) + read_s;
        used = std::max(used, read_end) + compute_s;
        released_[slot] = used;
        if (++slot == released_.size()) slot = 0;
      }
    }
  }
  return used - begin;
}

}  // namespace dcext
