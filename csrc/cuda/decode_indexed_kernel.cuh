// Zstandard frames decoded by a seek index, many threads to a frame.
//
// Layout: payloads as they are stored; indices of 448 bytes a block (codec/seek_index.h); matrices int8, dense, row-major.
// Launch: one CUDA block of four warps per zstd block (at most 128 KiB), for all blocks of all matrices. Warp w takes
//   stream w, lane l its segment l of 1,024 symbols. The table is built once (2,048 entries of two bytes).
//   Raw and repeated blocks are copied by all threads.
// Output: a lane decodes 128 bytes of its segment into shared memory, then the warp writes 32 times 128 bytes, a row of
//   words at a time, undoing the filter on the way: stores of whole lines, where lanes alone would write 4 bytes each
//   1,024 bytes apart. Rows of the staging buffer are padded by a word, so that neither side has bank conflicts.
// Input: a lane reads its stream a word at a time, from the back. Lines are its own, and read from the L1 cache 31 times
//   of 32.
// Shared memory: 22 KiB a block (table 4.4, staging 16.9), so ten blocks or 1,280 threads an SM of sm_90.
// What should limit it: the chain of a symbol (index, look-up in shared memory, shift: about 45 cycles), as long as
//   segments are fewer than threads (132 SMs hold 169,000, the segments of 165 MiB); then the issue of instructions, see
//   bench/gpu/README.md for the counts.
// Tested without a GPU by running this file on threads of a CPU (tests/emulated/), where a missing barrier is a data race.
// Measured: nothing yet.

#pragma once

#include "cuda/decode_indexed.h"

namespace dcext {

constexpr int kWarpSize = 32;
constexpr int kWarps = kMaxStreams;
constexpr int kThreads = kWarps * kWarpSize;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kStagedBytes = 128;  // of a lane: a line of the output
constexpr int kStagedWords = kStagedBytes / 4;
constexpr int kStagedStride = kStagedWords + 1;  // words; odd, so that lanes hit different banks
static_assert(kMaxSegments == kWarpSize, "a lane for each segment of a stream");
static_assert(kSegmentSymbols % kStagedBytes == 0, "segments are staged in whole lines");

struct Jobs {
  DecodeJob jobs[kMaxDecodeJobs];
  int64_t first_block[kMaxDecodeJobs];  // of the launch
  int count;
};
static_assert(sizeof(Jobs) + 64 <= 4096, "arguments of a kernel have 4 KiB on every architecture");

struct Shared {
  HuffmanTable table;
  bool table_ok;
  uint32_t staged[kWarps][kWarpSize * kStagedStride];
};

__device__ void report(int32_t* failures, int32_t failure) { atomicOr(failures, failure); }

/** All threads; afterwards the table is in shared memory, or `table_ok` is false. */
__device__ void build_table(const SeekBlock& block, Shared* shared) {
  const int thread = static_cast<int>(threadIdx.x);
  const bool has_weight = thread >= 1 && thread <= kMaxTableLog;
  if (has_weight) count_symbols(block, thread, &shared->table);
  __syncthreads();
  if (thread == 0) shared->table_ok = finish_counts(block, &shared->table);
  __syncthreads();
  if (!shared->table_ok) return;
  if (has_weight) list_symbols(block, thread, &shared->table);
  __syncthreads();
  for (int entry = thread; entry < 1 << block.table_log; entry += kThreads) {
    shared->table.entries[entry] = table_entry(block, shared->table, entry);
  }
  __syncthreads();
}

/** A segment's part of the work of its warp: symbols that a lane has to decode, and where they belong. */
struct Segment {
  uint32_t position;  // of the first symbol in the tile's content
  uint32_t count;
  uint32_t bits;  // that the index says it takes
  uint64_t top;
};

/** Where this lane begins: the bits of the segments before it are added up across the warp.
 *  @return whether the stream is as long as its segments together. */
__device__ bool find_segment(const SeekBlock& block, const DecodeTarget& target, int stream,
                             int lane, Segment* segment) {
  uint64_t begin = block.src;
  for (int i = 0; i < stream; ++i) begin += block.stream_nbytes[i];
  const uint64_t top = stream_top(target, begin + block.stream_nbytes[stream]);
  const uint32_t total = stream_symbols(block, stream);
  const uint32_t done = static_cast<uint32_t>(lane) * kSegmentSymbols;
  segment->count = done < total ? min(total - done, static_cast<uint32_t>(kSegmentSymbols)) : 0;
  segment->bits = segment->count == 0 ? 0 : block.segment_bits[stream][lane];
  uint32_t sum = segment->bits;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, sum, distance);
    if (lane >= distance) sum += other;
  }
  const uint32_t all = __shfl_sync(kFullWarp, sum, kWarpSize - 1);
  segment->position = block.first + static_cast<uint32_t>(stream) * stream_symbols(block, 0) + done;
  if (top != begin * 8 + all) return false;
  segment->top = top - (sum - segment->bits);
  return true;
}

/** Decodes up to kStagedBytes symbols of a lane into its row of the staging buffer. */
__device__ void decode_line(const uint16_t* entries, int table_log, uint32_t count,
                            SegmentReader* reader, uint32_t* row, uint32_t* bits) {
  const uint32_t words = count / 4;
  for (uint32_t i = 0; i < words; ++i) {
    const uint32_t low = reader->next_two(entries, table_log, bits);
    row[i] = low | reader->next_two(entries, table_log, bits) << 16;
  }
  if (count % 4 == 0) return;
  uint32_t word = 0;
  for (uint32_t i = 0; i < count % 4; ++i) {
    reader->refill();
    word |= reader->next_one(entries, table_log, bits) << (8 * i);
  }
  row[words] = word;
}

/** The warp writes what its lanes have staged: lane by lane a line, of which each thread has a word. */
__device__ void write_lines(const TileWriter& writer, const uint32_t* staged, int lane,
                            uint32_t position, uint32_t count) {
  for (int row = 0; row < kWarpSize; ++row) {
    const uint32_t row_count = __shfl_sync(kFullWarp, count, row);
    const uint32_t row_position = __shfl_sync(kFullWarp, position, row);
    if (row_count == 0) break;  // segments are full but for the last
    const uint32_t offset = static_cast<uint32_t>(lane) * 4;
    if (offset >= row_count) continue;
    const uint32_t word = staged[row * kStagedStride + lane];
    writer.write(row_position + offset, word, static_cast<int>(min(row_count - offset, 4u)));
  }
}

__device__ void decode_streams(const SeekBlock& block, const DecodeTarget& target,
                               const TileWriter& writer, Shared* shared, int32_t* failures) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int stream = static_cast<int>(threadIdx.x) / kWarpSize;
  build_table(block, shared);
  if (!shared->table_ok) {
    if (threadIdx.x == 0) report(failures, kDecodeBadTable);
    return;
  }
  if (stream >= block.num_streams) return;
  Segment segment;
  if (!find_segment(block, target, stream, lane, &segment)) {  // the same in all lanes
    if (lane == 0) report(failures, kDecodeBadStream);
    return;
  }
  const int table_log = block.table_log;
  uint32_t* const staged = shared->staged[stream];
  SegmentReader reader(target.payload, segment.top);
  uint32_t bits = 0, left = segment.count;
  for (int line = 0; line < kSegmentSymbols / kStagedBytes; ++line) {
    const uint32_t count = min(left, static_cast<uint32_t>(kStagedBytes));
    decode_line(shared->table.entries, table_log, count, &reader, staged + lane * kStagedStride,
                &bits);
    __syncwarp();
    write_lines(writer, staged, lane, segment.position + line * kStagedBytes, count);
    __syncwarp();
    left -= count;
  }
  if (bits != segment.bits) report(failures, kDecodeBadStream);
}

__device__ void copy_block(const SeekBlock& block, const DecodeTarget& target,
                           const TileWriter& writer) {
  const uint8_t* src = target.payload + block.src;
  const bool repeated = block.kind == SeekKind::kRepeated;
  const uint32_t words = block.size / 4;
  for (uint32_t i = threadIdx.x; i < words; i += kThreads) {
    const uint32_t bytes = repeated ? *src * 0x01010101u : load_four(src + uint64_t{i} * 4);
    writer.write(block.first + i * 4, bytes, 4);
  }
  if (threadIdx.x < block.size % 4) {
    const uint32_t i = words * 4 + threadIdx.x;
    writer.write(block.first + i, repeated ? *src : src[i], 1);
  }
}

__global__ void __launch_bounds__(kThreads)
    decode_indexed_kernel(const __grid_constant__ Jobs jobs,  // by first_block, ascending
                          int32_t* __restrict__ failures) {   // one word
  __shared__ Shared shared;
  int index = 0;
  while (index + 1 < jobs.count && int64_t{blockIdx.x} >= jobs.first_block[index + 1]) ++index;
  const DecodeTarget target = jobs.jobs[index].target;
  const SeekBlock& block = jobs.jobs[index].blocks[int64_t{blockIdx.x} - jobs.first_block[index]];
  if (!is_inside(block, target)) {  // the same in all threads
    if (threadIdx.x == 0) report(failures, kDecodeBadIndex);
    return;
  }
  const TileWriter writer(block, target);
  if (block.kind == SeekKind::kHuffman) {
    decode_streams(block, target, writer, &shared, failures);
  } else {
    copy_block(block, target, writer);
  }
  __syncthreads();  // exceptions replace what other threads wrote
  for (uint32_t i = threadIdx.x; i < block.num_exceptions; i += kThreads) {
    if (!writer.write_exception(i)) report(failures, kDecodeBadException);
  }
}

}  // namespace dcext
