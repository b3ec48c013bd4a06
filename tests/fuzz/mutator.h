#pragma once

#include "fuzz_input.h"
#include "fuzz_random.h"

namespace dcext::fuzz {

/** Changes an input a little: bytes, lengths and block headers of frames, the filter, the tile, the exceptions, what two
 *  inputs have in common; or bytes of the index or payload once indexed. Heads and checksums stay right, as damage there
 *  is found before the index is made.
 *  @param other   an input to take blocks from. */
void mutate(Random& random, const FuzzInput& other, FuzzInput* input);

}  // namespace dcext::fuzz
