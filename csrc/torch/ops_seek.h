#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "codec/payload_decoder.h"
#include "codec/seek_decode.h"

namespace dcext {

/** The seek index of a payload: (blocks, sizeof(SeekBlock)) uint8 on the CPU; nothing where it is outside the profile. */
std::optional<at::Tensor> seek_index(const at::Tensor& payload, Verify verify);

/** Checks the arguments of dcext::decode_indexed_, on any one device. */
void check_indexed(at::TensorList payloads, at::TensorList indices, at::TensorList outs,
                   const at::Tensor& failures);

/** The data of checked arguments. */
DecodeTarget decode_target(const at::Tensor& payload, const at::Tensor& out);

/** dcext::decode_indexed_ on the CPU: the steps of the CUDA kernel. */
void decode_indexed_cpu(at::TensorList payloads, at::TensorList indices, at::TensorList outs,
                        at::Tensor failures);

}  // namespace dcext
