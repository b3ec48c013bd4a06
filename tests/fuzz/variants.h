#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>

namespace dcext::fuzz {

// An enumeration, and its text for the names.
#define DCEXT_FUZZ_VARIANTS(...)              \
  enum class Variant { __VA_ARGS__, kCount }; \
  constexpr char kVariantNames[] = #__VA_ARGS__

/** What frames and payloads can be like. A run counts each, so that none is forgotten. */
DCEXT_FUZZ_VARIANTS(
    kRawChunk, kRawPayload, kFilterNone, kFilterPairs, kFilter2Bits, kFilter2BitsPairs,
    kFilter4Bits, kFilter4BitsPairs, kExceptionsNone, kExceptionsAscending, kExceptionsUnordered,
    kExceptionsEverywhere, kTileWhole, kTileSlabs, kTilePanels, kTileOddCols, kHeaderSingleSegment,
    kHeaderWindow, kHeaderNoContentSize, kContentSize1Byte, kContentSize2Bytes, kContentSize4Bytes,
    kContentSize8Bytes, kHeaderDictionaryIdZero, kFrame1Block, kFrame2To8Blocks, kFrameMoreBlocks,
    kFrameOver128Kib, kBlockEmptyRaw, kBlockEmptyRepeated, kBlockEmptyCompressed,
    kBlockEmptyHuffman, kBlockRaw, kBlockRepeated, kLiteralsRaw5Bits, kLiteralsRaw12Bits,
    kLiteralsRaw20Bits, kLiteralsRepeated5Bits, kLiteralsRepeated12Bits, kLiteralsRepeated20Bits,
    kHuffman1Stream, kHuffman4Streams10Bits, kHuffman4Streams14Bits, kHuffman4Streams18Bits,
    kTreeless1Stream, kTreeless4Streams, kTreelessAfterOtherBlocks, kTreeDirect, kTreeByFse,
    kAlphabet2, kAlphabetTo16, kAlphabetTo128, kAlphabetTo255, kAlphabet256, kTableLog1, kTableLog2,
    kTableLog3, kTableLog4, kTableLog5, kTableLog6, kTableLog7, kTableLog8, kTableLog9, kTableLog10,
    kTableLog11, kCodesAllLongest, kCodesAllShortest, kSize1, kSize5, kSize6, kSize7,
    kSize9LastStreamEmpty, kSize255, kSize256, kSize1023, kSize1024, kSize1025, kSize4095,
    kSize4096, kSize4097, kSize128Kib, kSizeNoMultipleOf4, kOutsideSequences, kOutsideChecksum,
    kOutsideTwoFrames, kOutsideSkippable, kOutsideDictionaryId, kOutside12BitCodes,
    kOutsideLongSequenceCount, kOutsideRepeatedException);

constexpr int kNumVariants = static_cast<int>(Variant::kCount);

/** How often each variant occurred. */
struct VariantCounts {
  int64_t counts[kNumVariants] = {};

  void add(Variant variant) { ++counts[static_cast<int>(variant)]; }
  /** The `index`-th after `first`, for variants that follow each other. */
  void add(Variant first, int index) { ++counts[static_cast<int>(first) + index]; }
  /** Prints all; returns how many never occurred. */
  int report() const {
    int missing = 0;
    const char* name = kVariantNames;
    for (const int64_t count : counts) {
      const int length = static_cast<int>(std::strcspn(name, ","));
      std::printf("%-30.*s %lld\n", length - 1, name + 1, static_cast<long long>(count));
      missing += count == 0;
      name += length + 2;  // a comma and a space
    }
    return missing;
  }
};

}  // namespace dcext::fuzz
