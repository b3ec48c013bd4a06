// Zstandard frames decoded by a seek index, many threads to a frame.
//
// Layout: payloads as they are stored; indices of 448 bytes a block (codec/seek_index.h); matrices int8, dense, row-major.
// Launch: one CUDA block of four warps per zstd block (at most 128 KiB), for all blocks of all matrices. Warp w takes
//   stream w, lane l its segment l of 1,024 symbols. The table is built once (2,048 entries of two bytes).
//   Raw and repeated blocks are copied by all threads.
// Output: a lane decodes a line, 64 bytes of its segment, into shared memory; then the warp writes 32 lines, 16 bytes a
//   thread and four threads a line, undoing the filter on the way: whole sectors, where lanes alone would write 16 bytes
//   each 1,024 bytes apart. Bytes that are not whole, aligned quads are written one by one.
// Input: a lane reads its stream a word at a time, from the back, a word ahead of its use. A sector serves eight words
//   if it stays in the L1 cache meanwhile: the 1,024 lanes of an SM use as many lines, 128 KiB, and sm_90 has 124 beside
//   what shared memory takes.
// Resources: 64 registers, no spills, 14.4 KiB of shared memory (table 4.3, staging 10): eight blocks or 1,024 threads an
//   SM of sm_80, sm_90 and sm_100; six of sm_120, by shared memory.
// Instructions (SASS of sm_90, nvcc 13.0): 10.6 a symbol to decode, 4.5 of them to refill; to write, 1.4 a symbol without a
//   filter, 5.4 with low bits, 5.2 with pairs and 9.6 with both, where a symbol is two weights.
// What should limit it: the chain of a symbol (shift, index, look-up in shared memory, length: about 45 cycles), as long
//   as segments are fewer than threads (132 SMs hold 135,000, the segments of 132 MiB). Then, of symbols a clock and SM:
//   10 by the issue of instructions (128 lanes, 12 each, without a filter), 9 by the banks of shared memory (32 look-ups
//   at random take about 3.5 turns).
// Tested without a GPU by running this file on threads of a CPU (tests/emulated/), where a missing barrier is a data race.
// Measured: nothing yet.

#pragma once

#include "cuda/decode_indexed.h"

namespace dcext {

constexpr int kWarpSize = 32;
constexpr int kWarps = kMaxStreams;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kBlocksPerSm = 8;  // at least, so at most 64 registers
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kStagedNbytes = 64;  // of a lane, a line: two whole sectors of the output
constexpr int kQuadsPerLine = kStagedNbytes / static_cast<int>(kQuadNbytes);
constexpr int kStagedStride = kQuadsPerLine + 1;  // quads; odd, so that lanes hit different banks
static_assert(kMaxSegments == kWarpSize, "a lane for each segment of a stream");
static_assert(kSegmentSymbols % kStagedNbytes == 0, "segments are staged in whole lines");

struct Jobs {
  DecodeJob jobs[kMaxDecodeJobs];
  int64_t first_block[kMaxDecodeJobs];  // of the launch
  int count;
};
static_assert(sizeof(Jobs) + 64 <= 4096, "arguments of a kernel have 4 KiB on every architecture");

struct Shared {
  HuffmanTable table;
  bool table_ok;
  Quad staged[kWarps][kWarpSize][kStagedStride];
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

/** Where the segment of this lane begins: the bits of those before it are added up across the warp.
 *  @param count   symbols of the segment's first line, 0 where the stream has no such segment.
 *  @param top, bits   receive the bit before which it begins, and how many the index says it takes.
 *  @return whether the stream is as long as its segments together; the same in all lanes. */
__device__ bool find_segment(const SeekBlock& block, const DecodeTarget& target, int stream,
                             int lane, int32_t count, uint64_t* top, uint32_t* bits) {
  uint64_t begin = block.src;
  for (int i = 0; i < stream; ++i) begin += block.stream_nbytes[i];
  const uint64_t stream_end = stream_top(target, begin + block.stream_nbytes[stream]);
  *bits = count == 0 ? 0 : block.segment_bits[stream][lane];
  uint32_t sum = *bits;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const uint32_t other = __shfl_up_sync(kFullWarp, sum, distance);
    if (lane >= distance) sum += other;
  }
  *top = stream_end - (sum - *bits);
  return stream_end == begin * 8 + __shfl_sync(kFullWarp, sum, kWarpSize - 1);
}

/** Symbols of a segment's next line.
 *  @param left   symbols of the stream from the first segment's line on; not positive where that has none. */
__device__ int32_t line_symbols(int32_t left, int segment) {
  return min(max(left - segment * kSegmentSymbols, 0), kStagedNbytes);
}

/** The warp writes what its lanes have staged, 16 bytes a thread.
 *  @param position   of the first segment's line in the tile's content. */
__device__ void write_lines(const TileWriter& writer, const Quad (*staged)[kStagedStride], int lane,
                            uint32_t position, int32_t left) {
  constexpr int kNbytes = kQuadNbytes, kRows = kWarpSize / kQuadsPerLine;  // at once
  const int row = lane / kQuadsPerLine, quad = lane % kQuadsPerLine;
  const Quad* src = &staged[row][quad];
  int32_t offset = row * kSegmentSymbols + quad * kNbytes;
  for (int i = 0; i < kQuadsPerLine; ++i) {
    if (offset + kNbytes > left || !writer.write_quad(position + offset, *src)) {
      const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(src);
      for (int32_t j = 0; j < min(left - offset, kNbytes); ++j) {
        writer.write_byte(position + offset + j, bytes[j]);
      }
    }
    src += kRows * kStagedStride;
    offset += kRows * kSegmentSymbols;
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
  int32_t left = static_cast<int32_t>(stream_symbols(block, stream));
  uint64_t top;
  uint32_t bits;
  if (!find_segment(block, target, stream, lane, line_symbols(left, lane), &top, &bits)) {
    if (lane == 0) report(failures, kDecodeBadStream);
    return;
  }
  const int table_log = block.table_log;
  uint32_t position = block.first + static_cast<uint32_t>(stream) * stream_symbols(block, 0);
  Quad(*const staged)[kStagedStride] = shared->staged[stream];
  SegmentReader reader(target.payload, top);
  const int32_t end = reader.position() - static_cast<int32_t>(bits);
  for (int line = 0; line < kSegmentSymbols / kStagedNbytes; ++line) {
    reader.read(shared->table.entries, table_log, line_symbols(left, lane), staged[lane]);
    __syncwarp();
    write_lines(writer, staged, lane, position, left);
    __syncwarp();
    left -= kStagedNbytes;
    position += kStagedNbytes;
  }
  if (reader.position() != end) report(failures, kDecodeBadStream);
}

__device__ void copy_block(const SeekBlock& block, const DecodeTarget& target,
                           const TileWriter& writer) {
  const uint8_t* src = target.payload + block.src;
  const bool repeated = block.kind == SeekKind::kRepeated;
  for (uint32_t i = threadIdx.x * kQuadNbytes; i < block.size; i += kThreads * kQuadNbytes) {
    const uint32_t count = min(block.size - i, kQuadNbytes);
    if (count == kQuadNbytes) {
      const uint32_t word = *src * 0x01010101u;
      Quad bytes{{word, word, word, word}};
      if (!repeated) load_words(src + i, bytes.words);
      if (writer.write_quad(block.first + i, bytes)) continue;
    }
    for (uint32_t j = i; j < i + count; ++j) {
      writer.write_byte(block.first + j, src[repeated ? 0 : j]);
    }
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    decode_indexed_kernel(const __grid_constant__ Jobs jobs,  // by first_block, ascending
                          int32_t* __restrict__ failures) {   // one word
  __shared__ Shared shared;
  int index = 0;
  while (index + 1 < jobs.count && int64_t{blockIdx.x} >= jobs.first_block[index + 1]) ++index;
  const DecodeTarget& target = jobs.jobs[index].target;
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
    if (!writer.write_exception(block, target, i)) report(failures, kDecodeBadException);
  }
}

}  // namespace dcext
