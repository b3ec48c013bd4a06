#include "decoder_check.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <set>

#include "codec/filter.h"
#include "codec/seek_decode.h"
#include "coverage.h"
#include "strict_decoder.h"

namespace dcext::fuzz {
namespace {

const FuzzInput* current = nullptr;

constexpr int64_t kMostWeights = int64_t{1} << 20;

class SerialExecutor : public Executor {
 public:
  int num_workers() const override { return 1; }
  void run(int64_t num_tasks, FunctionRef<void(int64_t, int)> task) override {
    for (int64_t i = 0; i < num_tasks; ++i) task(i, 0);
  }
};

// An allocation of its own of exactly `n` elements.
template <typename T>
class Exact {
 public:
  explicit Exact(size_t n) : data_(new T[n]), n_(n) {}
  Exact(const T* src, size_t n) : Exact(n) { std::copy_n(src, n, data_.get()); }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  size_t size() const { return n_; }

 private:
  std::unique_ptr<T[]> data_;
  size_t n_;
};

using Matrix = Exact<int8_t>;

void place_tile(const PayloadView& view, const Tile& tile, const int8_t* weights, Matrix* matrix) {
  const int64_t cols = view.layout().cols;
  for (int64_t r = 0; r < tile.rows; ++r) {
    std::copy_n(weights + r * tile.cols, tile.cols,
                matrix->data() + (tile.row + r) * cols + tile.col);
  }
}

SeekResult check_exceptions(const uint8_t* list, int64_t count, int64_t weights) {
  std::set<uint32_t> seen;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t place = load_le<uint32_t>(list + 4 * i) >> 8;
    if (place >= weights) return SeekResult::kCorrupt;
    if (!seen.insert(place).second) return SeekResult::kOutsideProfile;
  }
  return SeekResult::kIndexed;
}

// A chunk by the strict decoder; its tile goes to the matrix.
SeekResult decode_chunk_strictly(const PayloadView& view, int64_t index, Matrix* matrix,
                                 bool* lax) {
  const Chunk chunk = view.chunk(index);
  const Tile tile = view.tile(index);
  const uint8_t* src = view.data() + chunk.offset;
  *lax = false;
  const int64_t n = tile.weights();
  if (chunk.encoding == Encoding::kRaw) {
    place_tile(view, tile, reinterpret_cast<const int8_t*>(src), matrix);
    return SeekResult::kIndexed;
  }
  const uint8_t* planes = src + chunk.frame_nbytes;
  const uint8_t* list = planes + chunk.filter.planes_nbytes(n);
  const int64_t count = chunk.num_exceptions(tile);
  SeekResult result = check_exceptions(list, count, n);
  if (result != SeekResult::kIndexed) return result;
  ByteVector content;
  result = decode_strictly(src, chunk.frame_nbytes,
                           static_cast<uint64_t>(filtered_nbytes(chunk.filter, n)), &content, lax);
  if (result != SeekResult::kIndexed) return result;
  std::vector<int8_t> weights(content.begin(), content.end());
  if (!chunk.filter.identity()) {
    weights.assign(static_cast<size_t>(n), 0);
    undo_filter(chunk.filter, content.data(), planes, n, weights.data());
  }
  apply_exceptions(list, count, n, weights.data());
  place_tile(view, tile, weights.data(), matrix);
  return result;
}

// As build_seek_index goes about it with one worker: after the first chunk outside, no others are looked at.
SeekResult decode_strictly(const PayloadView& view, Matrix* matrix, CheckResult* result) {
  SeekResult all = SeekResult::kIndexed;
  for (int64_t i = 0; i < view.layout().num_chunks(); ++i) {
    bool lax = false;
    const SeekResult one = decode_chunk_strictly(view, i, matrix, &lax);
    if (one == SeekResult::kCorrupt) {
      const Tile tile = view.tile(i);
      Matrix dst(static_cast<size_t>(tile.weights()));
      if (decode_chunk(view, i, Verify::kNo, dst.data(), tile.weights()).ok()) {
        if (!lax) fail("libzstd decodes a chunk that is corrupt");
        result->lax = true;
      }
      all = one;
    } else if (one == SeekResult::kOutsideProfile) {
      return all == SeekResult::kIndexed ? one : all;
    }
  }
  return all;
}

bool decode_by_libzstd(const PayloadView& view, Matrix* matrix) {
  for (int64_t i = 0; i < view.layout().num_chunks(); ++i) {
    const Tile tile = view.tile(i);
    Matrix dst(static_cast<size_t>(tile.weights()));
    if (!decode_chunk(view, i, Verify::kNo, dst.data(), tile.weights()).ok()) return false;
    place_tile(view, tile, dst.data(), matrix);
  }
  return true;
}

DecodeTarget target_of(const PayloadView& view, const Exact<uint8_t>& payload, Matrix* matrix) {
  return {payload.data(), payload.size(), matrix->data(), static_cast<uint64_t>(view.layout().rows),
          static_cast<uint64_t>(view.layout().cols)};
}

int32_t decode_blocks(const Exact<SeekBlock>& index, const DecodeTarget& target) {
  int32_t failures = 0;
  for (size_t i = index.size(); i-- > 0;) {  // any order must do
    const int32_t failure = decode_seek_block(index.data()[i], target);
    cover_result(static_cast<uint32_t>(failure));
    failures |= failure;
  }
  return failures;
}

bool same(const Matrix& a, const int8_t* b) { return std::equal(b, b + a.size(), a.data()); }

void check_indexed(const PayloadView& view, const Exact<uint8_t>& payload,
                   const Exact<SeekBlock>& index, const Matrix& strict,
                   const std::vector<int8_t>* expected) {
  Matrix by_libzstd(strict.size()), by_index(strict.size());
  if (!decode_by_libzstd(view, &by_libzstd)) fail("libzstd refuses a payload that is indexed");
  std::fill_n(by_index.data(), by_index.size(), static_cast<int8_t>(0x5a));
  if (decode_blocks(index, target_of(view, payload, &by_index)) != kDecodeOk) {
    fail("a block of an indexed payload does not decode");
  }
  DecodeTarget empty = target_of(view, payload, &by_index);
  empty.rows = empty.cols = 0;
  if (decode_blocks(index, empty) != kDecodeBadIndex) fail("a block fits into an empty matrix");
  if (!same(by_libzstd, by_index.data())) fail("index and libzstd decode to different weights");
  if (!same(by_libzstd, strict.data())) fail("libzstd decodes to other weights than RFC 8878");
  if (expected != nullptr && !same(by_libzstd, expected->data())) {
    fail("decodes to other weights than were written");
  }
}

int32_t check_patched(const PayloadView& view, const Exact<uint8_t>& payload,
                      const Exact<SeekBlock>& index, const std::vector<Patch>& patches) {
  Exact<uint8_t> patched_payload(payload.data(), payload.size());
  Exact<SeekBlock> patched_index(index.data(), index.size());
  for (const Patch& patch : patches) {
    if (patch.of_index()) {
      patch.apply(reinterpret_cast<uint8_t*>(patched_index.data()),
                  index.size() * sizeof(SeekBlock));
    } else {
      patch.apply(patched_payload.data(), payload.size());
    }
  }
  Matrix matrix(static_cast<size_t>(view.layout().rows * view.layout().cols));
  return decode_blocks(patched_index, target_of(view, patched_payload, &matrix));
}

}  // namespace

const FuzzInput* current_input() { return current; }

void fail(const char* what) {
  std::fprintf(stderr, "seek_fuzz: %s\n", what);
  std::abort();
}

CheckResult check_input(const FuzzInput& input, const std::vector<int8_t>* expected) {
  current = &input;
  CheckResult result;
  const Exact<uint8_t> payload(input.payload.data(), input.payload.size());
  PayloadView view;
  if (!PayloadView::parse(payload.data(), payload.size(), &view).ok()) return result;
  const int64_t weights = view.layout().rows * view.layout().cols;
  if (weights > kMostWeights || view.layout().codec == Codec::kPacked) return result;
  result.parsed = true;

  SerialExecutor executor;
  std::unique_ptr<Exact<SeekBlock>> index;
  bool inside = false;
  const Failure failure = build_seek_index(
      view, expected != nullptr ? Verify::kYes : Verify::kNo, executor,
      [&](int64_t n) {
        index = std::make_unique<Exact<SeekBlock>>(static_cast<size_t>(n));
        return index->data();
      },
      &inside);
  if (!failure.ok() && failure.status != Status::kCorrupt) fail("an unexpected failure");
  result.seek = !failure.ok() ? SeekResult::kCorrupt
                : inside      ? SeekResult::kIndexed
                              : SeekResult::kOutsideProfile;
  cover_result(16 + static_cast<uint32_t>(result.seek));

  Matrix strict(static_cast<size_t>(weights));
  if (decode_strictly(view, &strict, &result) != result.seek) {
    fail("the index and RFC 8878 disagree on whether a payload is inside the profile or corrupt");
  }
  if (result.seek != SeekResult::kIndexed) {
    Matrix matrix(static_cast<size_t>(weights));
    result.libzstd_decodes = decode_by_libzstd(view, &matrix);
    if (result.libzstd_decodes && expected != nullptr && !same(matrix, expected->data())) {
      fail("libzstd decodes to other weights than were written");
    }
    return result;
  }
  result.libzstd_decodes = true;
  check_indexed(view, payload, *index, strict, expected);
  if (!input.patches.empty()) {
    result.failures = check_patched(view, payload, *index, input.patches);
  }
  return result;
}

}  // namespace dcext::fuzz
