// SPDX-License-Identifier: BSD-3-Clause
#pragma once

/// The oldest libtorch that the binaries run on: 2.11. Every file that includes torch headers
/// includes this one first; only the stable ABI (torch/csrc/stable, torch/headeronly) is allowed.
#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION 0x020b000000000000ULL
#endif
