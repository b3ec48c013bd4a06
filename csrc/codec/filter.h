#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "format/payload.h"

namespace dcext {

// The reversible transform between weights and the bytes that zstd codes (PAYLOAD.md, "Filter").
//
// A weight w is split into high = w >> low_bits and the low_bits below it. The lowest bits of a wide distribution are
// as good as random: they are stored as they are, in bit planes, and the entropy coder sees a narrow distribution of
// highs, which its 11-bit Huffman codes fit better and decode faster. With `pairs`, two highs share a byte: half as
// many symbols to decode, and below about 2.5 bits a code of pairs is closer to the entropy than one of single weights.
//
// Weights are taken in groups of 128; a last, shorter group is filled up with zeros. A weight whose high (or pair of
// highs) has no code, or too rare a one, is an *exception*: zero stands in the frame, and the weight in a list.

constexpr int64_t kFilterGroup = 128;

/** An exception as stored: position in the tile << 8 | the weight's byte. */
using FilterException = uint32_t;

/** Bytes that the frame decodes to, for a tile of `n` weights. */
int64_t filtered_nbytes(const Filter& filter, int64_t n);

/** Splits a tile.
 *  @param highs   receives `filtered_nbytes(filter, n)` bytes.
 *  @param planes   receives `filter.planes_nbytes(n)` bytes.
 *  @param exceptions   appended to; each position at most once. */
void apply_filter(const Filter& filter, const int8_t* src, int64_t n, uint8_t* highs,
                  uint8_t* planes, std::vector<FilterException>* exceptions);

/** A lower bound on what a tile costs under a filter, in bits per weight: the entropy of its highs, the planes, and
 *  the exceptions that do not fit in four bits.
 *  @param counts   how often each weight occurs, indexed by its byte. */
double estimate_bits(const Filter& filter, const int64_t (&counts)[256]);

/** Undoes apply_filter, but for the exceptions.
 *  @param highs   as decoded from the frame. Without `pairs` it may be `dst` itself; otherwise they do not overlap. */
void undo_filter(const Filter& filter, const uint8_t* highs, const uint8_t* planes, int64_t n,
                 int8_t* dst);

/** Writes the exceptions over the weights.
 *  @param exceptions   `count` little-endian words at any alignment.
 *  @return false, with an unspecified part written, when a position is not below `n`. */
bool apply_exceptions(const uint8_t* exceptions, int64_t count, int64_t n, int8_t* dst);

}  // namespace dcext
