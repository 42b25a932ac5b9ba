// SPDX-License-Identifier: BSD-3-Clause
/// Runs the machine code of a CUDA kernel (sm_90) on the host and counts what it does. sass.py
/// parses the listing of nvdisasm into the structs below and compiles this file on first use.
///
/// One warp at a time, all 32 lanes of an instruction together. Lanes that diverge go on as
/// separate paths until the convergence barriers of the code (BSSY, BSYNC, BREAK) join them, so an
/// instruction counts once for each time that the GPU issues it. Global addresses are addresses of
/// this process. Beside the issue counts it keeps, per instruction, the 32-byte sectors and
/// 128-byte lines that the lanes touch, the passes through shared memory that bank conflicts cost,
/// and the sectors that miss a share of L1.
///
/// Not modelled: time. Waiting, caching beyond that share of L1, and the order of warps are not
/// what a GPU does.
#include <setjmp.h>
#include <signal.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

namespace {

constexpr int kLanes = 32;
constexpr uint32_t kAll = 0xffffffffu;
constexpr int kTrue = 7;                  // PT and UPT
constexpr uint32_t kSharedStart = 0x400;  // the first kilobyte belongs to the system
constexpr uint32_t kSharedBytes = 228 * 1024;
constexpr uint32_t kLocalBytes = 4096;
constexpr uint64_t kMostIssuesOfBlock = 200'000'000;

// The order of both lists is that of sass.py.
enum Kind : uint8_t { kNone, kReg, kUreg, kImm, kConst, kPred, kUpred, kAddress, kLabel, kBarrier };
// clang-format off
#define SASS_OPERATIONS(X) \
  X(ATOM) X(ATOMG) X(BAR) X(BRA) X(BREAK) X(BREV) X(BSSY) X(BSYNC) X(CALL) X(CS2R) X(DADD) \
  X(DEPBAR) X(DFMA) X(DMNMX) X(DMUL) X(DSETP) X(EXIT) X(F2F) X(F2FP) X(F2I) X(FADD) X(FCHK) \
  X(FFMA) X(FLO) X(FMNMX) X(FMUL) X(FRND) X(FSEL) X(FSET) X(FSETP) X(HADD2) X(HFMA2) X(HMUL2) \
  X(I2F) X(I2FP) X(IABS) X(IADD3) X(IMAD) X(IMNMX) X(ISETP) X(LD) X(LDC) X(LDG) X(LDGDEPBAR) \
  X(LDGSTS) X(LDL) X(LDS) X(LEA) X(LOP3) X(MOV) X(MUFU) X(NOP) X(P2R) X(PLOP3) X(POPC) X(PRMT) \
  X(QSPC) X(R2P) X(R2UR) X(RED) X(REDG) X(RET) X(S2R) X(S2UR) X(SEL) X(SHF) X(SHFL) X(ST) \
  X(STG) X(STL) X(STS) X(UBREV) X(UFLO) X(UIADD3) X(UIMAD) X(UIMNMX) X(UISETP) X(ULDC) X(ULEA) \
  X(ULOP3) X(UMOV) X(UPLOP3) X(UPOPC) X(UPRMT) X(USEL) X(USHF) X(VIADD) X(VIADDMNMX) X(VIMNMX) \
  X(VIMNMX3) X(VOTE) X(VOTEU) X(WARPSYNC) X(YIELD) X(UNKNOWN)
// clang-format on
enum Operation : uint16_t {
#define SASS_NAME(name) name,
  SASS_OPERATIONS(SASS_NAME)
#undef SASS_NAME
};

struct Operand {
  uint8_t kind;
  uint8_t negative, absolute, inverted;  // -x, |x|, ~x or !p
  int16_t reg;                           // of an address: the register, 255 for none
  int16_t ureg;                          // of an address: the uniform register, 63 for none
  uint8_t half;                          // 0: both, 1: H0_H0, 2: H1_H1
  uint8_t wide;                          // of an address: the register is a pair
  uint8_t scale;                         // of an address: the register times this
  uint8_t pad;
  int64_t value;  // immediate bits, offset, address of a label
};

struct Instruction {
  uint16_t operation;
  uint8_t guard, guard_inverted, guard_uniform;
  uint8_t operands;
  uint8_t bytes;     // of a memory access, per lane
  uint8_t compare;   // LT EQ LE GT NE GE LTU EQU LEU GTU NEU GEU NUM NAN, from 1
  uint8_t combine;   // AND OR XOR
  uint8_t rounding;  // RN RM RP RZ
  uint8_t from, to;  // number formats of a conversion
  uint32_t flags;
  Operand operand[8];
};

enum Flag : uint32_t {
  kX = 1,
  kHi = 2,
  kWide = 4,
  kUnsigned = 8,
  kExtended = 16,
  kLeft = 32,
  kWrap = 64,
  kLong = 128,
  kSx32 = 256,
  kShow = 512,
  kFtz = 1024,
  kSignedLoad = 2048,
  kDiv = 4096,
  kAll_ = 8192,
  kUp = 16384,
  kDown = 32768,
  kButterfly = 65536,
  kF32 = 1 << 17,
  kBf16 = 1 << 18,
  kNan = 1 << 19,
  kRsq = 1 << 20,
  kRcp = 1 << 21,
  kHalf64 = 1 << 22,
  kEx2 = 1 << 23,
  kLg2 = 1 << 24,
  kSin = 1 << 25,
  kCos = 1 << 26,
  kSqrt = 1 << 27,
  kShort = 1 << 28,
  kCas = 1 << 29,
  kCollective = 1 << 30,
  kConv = 1u << 31,
};

enum Format : uint8_t {
  kS32,
  kU32,
  kS64,
  kU64,
  kFloat32,
  kFloat64,
  kU16,
  kS16,
  kU8,
  kS8,
  kFloat16
};

/// What one instruction did in all blocks that ran.
struct Count {
  uint64_t issues;   // by warps
  uint64_t lanes;    // that were active
  uint64_t sectors;  // of 32 bytes, distinct per warp
  uint64_t lines;    // of 128 bytes, distinct per warp
  uint64_t passes;   // through shared memory
  uint64_t missed;   // sectors that were not in the block's share of L1
  uint64_t bytes;    // that the lanes asked for
};

struct Launch {
  const Instruction* code;
  uint64_t instructions;
  const uint8_t* constants;
  uint64_t constant_bytes;
  uint32_t grid[3];
  uint32_t block;
  uint32_t l1_bytes;       // of one block
  uint64_t blocks;         // how many to run
  const uint64_t* which;   // their linear indices
  Count* counts;           // per instruction
  uint64_t* block_issues;  // per block that ran
  uint64_t* longest_warp;  // issues of the busiest warp
  uint64_t* read_sectors;  // distinct 32-byte sectors of global memory, over all blocks
  uint64_t* written_sectors;
};

float as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
uint32_t bits_of(float v) {
  uint32_t b;
  std::memcpy(&b, &v, 4);
  return b;
}
double as_double(uint64_t bits) {
  double v;
  std::memcpy(&v, &bits, 8);
  return v;
}
uint64_t bits_of(double v) {
  uint64_t b;
  std::memcpy(&b, &v, 8);
  return b;
}

float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 0) {
    const float v = std::ldexp(static_cast<float>(fraction), -24);
    return sign ? -v : v;
  }
  if (exponent == 31) return as_float(sign | 0x7f800000u | fraction << 13);
  return as_float(sign | (exponent + 112) << 23 | fraction << 13);
}
uint16_t to_half(float v) {
  const uint32_t bits = bits_of(v);
  const uint16_t sign = bits >> 16 & 0x8000;
  const float a = std::fabs(v);
  if (std::isnan(v)) return 0x7fff;
  if (a >= 65520.0f) return sign | 0x7c00;
  if (a < std::ldexp(1.0f, -14)) {
    return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(a, 24)));
  }
  uint32_t b = bits & 0x7fffffffu;
  b += 0xfffu + (b >> 13 & 1);
  return sign | static_cast<uint16_t>((b >> 13) - (112u << 10));
}
uint16_t to_bf16(float v) {
  uint32_t b = bits_of(v);
  if (std::isnan(v)) return 0x7fff;
  b += 0x7fffu + (b >> 16 & 1);
  return static_cast<uint16_t>(b >> 16);
}

[[noreturn]] void wrong(const std::string& what) { throw std::runtime_error(what); }

/// Distinct 32-byte sectors: a bit each, by pages of 8 KB.
class SectorSet {
 public:
  void add(uint64_t sector) {
    const uint64_t page = sector >> 8;
    if (page != last_page_) {
      last_page_ = page;
      last_ = &pages_[page];
    }
    uint64_t& word = last_->word[sector >> 6 & 3];
    const uint64_t bit = uint64_t{1} << (sector & 63);
    count_ += (word & bit) == 0;
    word |= bit;
  }
  uint64_t count() const { return count_; }

 private:
  struct Page {
    uint64_t word[4] = {};
  };
  std::unordered_map<uint64_t, Page> pages_;
  uint64_t last_page_ = ~uint64_t{0};
  Page* last_ = nullptr;
  uint64_t count_ = 0;
};

/// Lines of 128 bytes with a bit per sector, 4 ways, least recently used.
class L1 {
 public:
  void start(uint32_t bytes) {
    sets_ = std::max<uint32_t>(1, bytes / 512);
    line_.assign(sets_ * 4, Line{});
    clock_ = 0;
  }
  /// True on a miss.
  bool read(uint64_t sector) {
    const uint64_t tag = sector >> 2;
    Line* set = &line_[(tag ^ tag / sets_) % sets_ * 4];
    Line* victim = set;
    for (int i = 0; i < 4; ++i) {
      if (set[i].valid != 0 && set[i].tag == tag) {
        victim = set + i;
        break;
      }
      if (set[i].used < victim->used) victim = set + i;
    }
    if (victim->valid == 0 || victim->tag != tag) *victim = {tag, 0, 0};
    victim->used = ++clock_;
    const uint8_t bit = static_cast<uint8_t>(1u << (sector & 3));
    const bool miss = (victim->valid & bit) == 0;
    victim->valid |= bit;
    return miss;
  }

 private:
  struct Line {
    uint64_t tag = 0, used = 0;
    uint8_t valid = 0;
  };
  uint32_t sets_ = 1;
  uint64_t clock_ = 0;
  std::vector<Line> line_;
};

struct Path {
  uint32_t pc;    // index of the next instruction
  uint32_t mask;  // the lanes that are there
  int waits;      // -1: runs, 0..15: at that convergence barrier, 16: at a block barrier, 17: warp
};

using Row = uint32_t[kLanes];

struct Warp {
  Row reg[256];
  uint32_t ureg[64];
  uint32_t pred[8];  // a bit per lane
  bool upred[8];
  uint32_t barrier[16];
  uint32_t alive;
  uint32_t first_thread;
  uint64_t issues;
  std::vector<Path> path;
  std::vector<uint8_t> local;
};

class Machine {
 public:
  explicit Machine(const Launch& launch) : l_(launch), shared_(kSharedBytes + 64) {
    const uint32_t warps = (launch.block + kLanes - 1) / kLanes;
    warp_.resize(warps);
    for (auto& warp : warp_) warp = std::make_unique<Warp>();
  }

  /// The instruction that runs, for errors.
  std::string place() const {
    return "block (" + std::to_string(ctaid_[0]) + ", " + std::to_string(ctaid_[1]) + ", " +
           std::to_string(ctaid_[2]) + "), instruction " + std::to_string(at_);
  }

  void run() {
    for (uint64_t i = 0; i < l_.blocks; ++i) try {
        const uint64_t index = l_.which[i];
        ctaid_[0] = static_cast<uint32_t>(index % l_.grid[0]);
        ctaid_[1] = static_cast<uint32_t>(index / l_.grid[0] % l_.grid[1]);
        ctaid_[2] = static_cast<uint32_t>(index / l_.grid[0] / l_.grid[1]);
        l_.block_issues[i] = run_block();
      } catch (const std::exception& error) {
        wrong(place() + ": " + error.what());
      }
    *l_.read_sectors = read_.count();
    *l_.written_sectors = written_.count();
  }

 private:
  uint64_t run_block() {
    std::memset(shared_.data(), 0xff, shared_.size());
    l1_.start(l_.l1_bytes);
    for (size_t i = 0; i < warp_.size(); ++i) {
      Warp& w = *warp_[i];
      std::memset(w.reg, 0xff, sizeof(w.reg));
      std::memset(w.reg[255], 0, sizeof(Row));
      std::memset(w.ureg, 0xff, sizeof(w.ureg));
      w.ureg[63] = 0;
      std::memset(w.pred, 0, sizeof(w.pred));
      std::memset(w.upred, 0, sizeof(w.upred));
      w.pred[kTrue] = kAll;
      w.upred[kTrue] = true;
      std::memset(w.barrier, 0, sizeof(w.barrier));
      w.first_thread = static_cast<uint32_t>(i) * kLanes;
      const uint32_t left = l_.block - w.first_thread;
      w.alive = left >= kLanes ? kAll : (1u << left) - 1;
      w.issues = 0;
      w.path.assign(1, Path{0, w.alive, -1});
    }
    uint64_t issues = 0;
    for (;;) {
      bool ran = false, any_alive = false;
      for (auto& warp : warp_) {
        const uint64_t before = warp->issues;
        run_warp(*warp);
        issues += warp->issues - before;
        ran = ran || warp->issues != before;
        any_alive = any_alive || warp->alive != 0;
      }
      if (!any_alive) break;
      if (!ran && !release_block()) wrong("the block waits for threads that never come");
      if (issues > kMostIssuesOfBlock) wrong("a block does not end");
    }
    for (auto& warp : warp_) *l_.longest_warp = std::max(*l_.longest_warp, warp->issues);
    return issues;
  }

  /// Continues the block barrier when every thread that has not ended is there.
  bool release_block() {
    for (auto& warp : warp_) {
      uint32_t there = 0;
      for (const Path& p : warp->path) there |= p.waits == 16 ? p.mask : 0;
      if (there != warp->alive) return false;
    }
    for (auto& warp : warp_) {
      for (Path& p : warp->path) p.waits = -1;
    }
    return true;
  }

  /// Joins paths at a convergence barrier once all of its lanes are there.
  static void join(Warp& w) {
    for (size_t i = 0; i < w.path.size(); ++i) {
      const int at = w.path[i].waits;
      if (at < 0 || at == 16) continue;
      const uint32_t wanted = (at == 17 ? kAll : w.barrier[at]) & w.alive;
      uint32_t there = 0;
      for (const Path& p : w.path) {
        if (p.waits == at && p.pc == w.path[i].pc) there |= p.mask;
      }
      if ((wanted & ~there) != 0) continue;
      Path joined{w.path[i].pc, there, -1};
      w.path.erase(
          std::remove_if(w.path.begin(), w.path.end(),
                         [&](const Path& p) { return p.waits == at && p.pc == joined.pc; }),
          w.path.end());
      w.path.push_back(joined);
      i = static_cast<size_t>(-1);
    }
  }

  /// Until it waits for the block, or has had its turn.
  void run_warp(Warp& w) {
    constexpr uint64_t kTurn = 96;
    const uint64_t end = w.issues + kTurn;
    while (w.issues < end) {
      // At once: another path may use the same barrier for a part of the code of its own.
      join(w);
      size_t at = w.path.size();
      for (size_t i = w.path.size(); i-- > 0;) {
        if (w.path[i].waits == -1) {
          at = i;
          break;
        }
      }
      if (at == w.path.size()) return;
      while (w.issues < end && at < w.path.size() && w.path[at].waits == -1) {
        const size_t paths = w.path.size();
        step(w, at);
        if (w.path.size() != paths) break;
      }
    }
  }

  // ------------------------------------------------------------------------------------ operands

  uint32_t constant(uint64_t offset) const {
    if (offset + 4 > l_.constant_bytes) wrong("a constant behind the parameters");
    uint32_t v;
    std::memcpy(&v, l_.constants + offset, 4);
    return v;
  }

  /// Word `part` (0 low, 1 high) of an operand, in all lanes, without its sign.
  const uint32_t* raw(Warp& w, const Operand& o, int part, uint32_t* room) {
    uint32_t v = 0;
    switch (o.kind) {
      case kReg:
        return o.reg == 255 ? w.reg[255] : w.reg[o.reg + part];
      case kUreg:
        v = o.ureg == 63 ? 0 : w.ureg[o.ureg + part];
        break;
      case kImm:
        v = static_cast<uint32_t>(static_cast<uint64_t>(o.value) >> (32 * part));
        break;
      case kConst:
        v = constant(static_cast<uint64_t>(o.value) + 4u * static_cast<unsigned>(part));
        break;
      default:
        wrong("not an operand of a number");
    }
    std::fill(room, room + kLanes, v);
    return room;
  }

  const uint32_t* integer(Warp& w, const Operand& o, uint32_t* room) {
    const uint32_t* v = raw(w, o, 0, room);
    if (!o.negative && !o.inverted && !o.absolute) return v;
    for (int i = 0; i < kLanes; ++i) {
      uint32_t x = v[i];
      if (o.absolute && static_cast<int32_t>(x) < 0) x = 0u - x;
      if (o.negative) x = 0u - x;
      room[i] = o.inverted ? ~x : x;
    }
    return room;
  }

  void long_integer(Warp& w, const Operand& o, uint64_t* out) {
    uint32_t a[kLanes], b[kLanes];
    const uint32_t* low = raw(w, o, 0, a);
    if (o.kind == kImm) {
      for (int i = 0; i < kLanes; ++i) out[i] = static_cast<uint64_t>(o.value);
    } else {
      const uint32_t* high = raw(w, o, 1, b);
      for (int i = 0; i < kLanes; ++i) out[i] = static_cast<uint64_t>(high[i]) << 32 | low[i];
    }
    for (int i = 0; i < kLanes; ++i) {
      if (o.negative) out[i] = 0u - out[i];
      if (o.inverted) out[i] = ~out[i];
    }
  }

  const float* real(Warp& w, const Operand& o, float* room) {
    if (!o.negative && !o.absolute && o.kind == kReg) {
      return reinterpret_cast<const float*>(w.reg[o.reg]);  // a row is memory of either type
    }
    uint32_t bits[kLanes];
    const uint32_t* v = raw(w, o, 0, bits);
    for (int i = 0; i < kLanes; ++i) {
      uint32_t x = v[i];
      if (o.absolute) x &= 0x7fffffffu;
      if (o.negative) x ^= 0x80000000u;
      room[i] = as_float(x);
    }
    return room;
  }

  void long_real(Warp& w, const Operand& o, double* out) {
    uint32_t a[kLanes], b[kLanes];
    const uint32_t* low = raw(w, o, 0, a);
    const uint32_t* high = raw(w, o, 1, b);
    for (int i = 0; i < kLanes; ++i) {
      uint64_t x = static_cast<uint64_t>(high[i]) << 32 | low[i];
      if (o.absolute) x &= ~(uint64_t{1} << 63);
      if (o.negative) x ^= uint64_t{1} << 63;
      out[i] = as_double(x);
    }
  }

  /// Halves as floats: [0] the low ones.
  void halves(Warp& w, const Operand& o, float (*out)[kLanes]) {
    uint32_t room[kLanes];
    const uint32_t* v = raw(w, o, 0, room);
    for (int i = 0; i < kLanes; ++i) {
      float low = from_half(static_cast<uint16_t>(v[i]));
      float high = from_half(static_cast<uint16_t>(v[i] >> 16));
      if (o.half == 1) high = low;
      if (o.half == 2) low = high;
      if (o.absolute) low = std::fabs(low), high = std::fabs(high);
      out[0][i] = o.negative ? -low : low;
      out[1][i] = o.negative ? -high : high;
    }
  }

  /// A bit per lane.
  static uint32_t predicate(const Warp& w, const Operand& o) {
    uint32_t v = 0;
    if (o.kind == kPred) {
      v = w.pred[o.reg];
    } else if (o.kind == kUpred) {
      v = w.upred[o.reg] ? kAll : 0;
    } else {
      wrong("not a predicate");
    }
    return o.inverted ? ~v : v;
  }

  static void set_predicate(Warp& w, const Operand& o, uint32_t value, uint32_t mask) {
    if (o.reg == kTrue) return;
    if (o.kind == kUpred) {
      w.upred[o.reg] = (value & mask) != 0;
    } else {
      w.pred[o.reg] = (w.pred[o.reg] & ~mask) | (value & mask);
    }
  }

  template <class F>
  static void store(Warp& w, const Operand& o, uint32_t mask, int part, const F& value) {
    if (o.kind == kUreg) {
      if (o.ureg != 63) w.ureg[o.ureg + part] = value(__builtin_ctz(mask));
      return;
    }
    if (o.reg == 255) return;
    uint32_t* row = w.reg[o.reg + part];
    if (mask == kAll) {
      uint32_t out[kLanes];
      for (int i = 0; i < kLanes; ++i) out[i] = value(i);
      std::memcpy(row, out, sizeof(out));
    } else {
      uint32_t out[kLanes];
      for (int i = 0; i < kLanes; ++i) out[i] = value(i);
      for (int i = 0; i < kLanes; ++i) row[i] = mask >> i & 1 ? out[i] : row[i];
    }
  }
  template <class F>
  static void store_long(Warp& w, const Operand& o, uint32_t mask, const F& value) {
    uint64_t out[kLanes];
    for (int i = 0; i < kLanes; ++i) out[i] = value(i);
    store(w, o, mask, 0, [&](int i) { return static_cast<uint32_t>(out[i]); });
    store(w, o, mask, 1, [&](int i) { return static_cast<uint32_t>(out[i] >> 32); });
  }

  // -------------------------------------------------------------------------------------- memory

  void addresses(Warp& w, const Operand& o, uint32_t mask, uint64_t* out) {
    const uint64_t uniform =
        o.ureg == 63
            ? 0
            : (o.wide ? static_cast<uint64_t>(w.ureg[o.ureg + 1]) << 32 : 0) | w.ureg[o.ureg];
    for (int i = 0; i < kLanes; ++i) {
      uint64_t base = 0;
      if (o.reg != 255) {
        base = w.reg[o.reg][i];
        if (o.wide == 1) base |= static_cast<uint64_t>(w.reg[o.reg + 1][i]) << 32;
        base *= o.scale;
      }
      out[i] = base + uniform + static_cast<uint64_t>(o.value);
      if (o.wide == 0) out[i] = static_cast<uint32_t>(out[i]);
      if ((mask >> i & 1) == 0) out[i] = 0;
    }
  }

  void count_global(Count& count, const uint64_t* address, uint32_t mask, int bytes, bool write,
                    bool cached) {
    uint64_t sector[kLanes], line[kLanes];
    int sectors = 0, lines = 0;
    for (int i = 0; i < kLanes; ++i) {
      if ((mask >> i & 1) == 0) continue;
      count.bytes += static_cast<uint64_t>(bytes);
      const uint64_t s = address[i] >> 5, l = address[i] >> 7;
      if (sectors == 0 || (sector[sectors - 1] != s &&
                           std::find(sector, sector + sectors, s) == sector + sectors)) {
        sector[sectors++] = s;
      }
      if (lines == 0 ||
          (line[lines - 1] != l && std::find(line, line + lines, l) == line + lines)) {
        line[lines++] = l;
      }
    }
    count.sectors += static_cast<uint64_t>(sectors);
    count.lines += static_cast<uint64_t>(lines);
    for (int i = 0; i < sectors; ++i) {
      if (write) {
        written_.add(sector[i]);
        ++count.missed;
      } else if (!cached || l1_.read(sector[i])) {
        ++count.missed;
        read_.add(sector[i]);
      }
    }
  }

  /// 32 banks of 4 bytes; lanes that read one word share it. Wide accesses go by halves or quarters
  /// of the warp.
  static uint64_t bank_passes(const uint64_t* address, uint32_t mask, int bytes) {
    const int groups = bytes == 16 ? 4 : bytes == 8 ? 2 : 1;
    const int lanes = kLanes / groups, words = std::max(1, bytes / 4);
    uint64_t passes = 0;
    for (int g = 0; g < groups; ++g) {
      uint64_t seen[kLanes][kLanes];
      int depth[kLanes] = {};
      int most = 0;
      for (int i = g * lanes; i < (g + 1) * lanes; ++i) {
        if ((mask >> i & 1) == 0) continue;
        for (int j = 0; j < words; ++j) {
          const uint64_t word = address[i] / 4 + static_cast<uint64_t>(j);
          const int bank = static_cast<int>(word % 32);
          bool known = false;
          for (int d = 0; d < depth[bank] && !known; ++d) known = seen[bank][d] == word;
          if (!known) {
            seen[bank][depth[bank]++] = word;
            most = std::max(most, depth[bank]);
          }
        }
      }
      passes += static_cast<uint64_t>(most);
    }
    return std::max<uint64_t>(passes, 1);
  }

  uint8_t* shared(uint64_t address, int bytes) {
    if (address < kSharedStart || address + static_cast<uint64_t>(bytes) > kSharedBytes ||
        address % static_cast<uint64_t>(bytes) != 0) {
      wrong("shared memory at " + std::to_string(address));
    }
    return shared_.data() + address;
  }

  uint8_t* local(Warp& w, int lane, uint64_t address, int bytes) {
    if (w.local.empty()) w.local.resize(kLanes * kLocalBytes);
    if (address + static_cast<uint64_t>(bytes) > kLocalBytes) wrong("local memory");
    return w.local.data() + static_cast<size_t>(lane) * kLocalBytes + address;
  }

  template <class Place>
  void load(Warp& w, const Instruction& in, const Operand& to, uint32_t mask, const Place& place) {
    for (int i = 0; i < kLanes; ++i) {
      if ((mask >> i & 1) == 0) continue;
      const uint8_t* from = place(i);
      if (in.bytes < 4) {
        uint32_t v = 0;
        std::memcpy(&v, from, in.bytes);
        if (in.flags & kSignedLoad) {
          const int shift = 32 - 8 * in.bytes;
          v = static_cast<uint32_t>(static_cast<int32_t>(v << shift) >> shift);
        }
        if (to.reg != 255) w.reg[to.reg][i] = v;
      } else if (to.reg != 255) {
        for (int j = 0; j < in.bytes / 4; ++j) std::memcpy(&w.reg[to.reg + j][i], from + 4 * j, 4);
      }
    }
  }

  template <class Place>
  void save(Warp& w, const Instruction& in, const Operand& from, uint32_t mask,
            const Place& place) {
    for (int i = 0; i < kLanes; ++i) {
      if ((mask >> i & 1) == 0) continue;
      uint8_t* to = place(i);
      if (in.bytes < 4) {
        std::memcpy(to, from.reg == 255 ? &w.reg[255][i] : &w.reg[from.reg][i], in.bytes);
      } else {
        for (int j = 0; j < in.bytes / 4; ++j) {
          std::memcpy(to + 4 * j, from.reg == 255 ? &w.reg[255][i] : &w.reg[from.reg + j][i], 4);
        }
      }
    }
  }

  // ----------------------------------------------------------------------------------- arithmetic

  static bool compare(int how, bool less, bool equal, bool unordered) {
    switch (how) {
      case 1:
        return less && !unordered;
      case 2:
        return equal;
      case 3:
        return (less || equal) && !unordered;
      case 4:
        return !less && !equal && !unordered;
      case 5:
        return !equal && !unordered;
      case 6:
        return !less && !unordered;
      case 7:
        return less || unordered;
      case 8:
        return equal || unordered;
      case 9:
        return less || equal || unordered;
      case 10:
        return (!less && !equal) || unordered;
      case 11:
        return !equal || unordered;
      case 12:
        return !less || unordered;
      case 13:
        return !unordered;
      case 14:
        return unordered;
    }
    wrong("an unknown comparison");
  }

  static uint32_t combined(int how, uint32_t a, uint32_t b) {
    return how == 0 ? a & b : how == 1 ? a | b : a ^ b;
  }

  static uint32_t logic(uint32_t table, uint32_t a, uint32_t b, uint32_t c) {
    uint32_t out = 0;
    if (table & 1) out |= ~a & ~b & ~c;
    if (table & 2) out |= ~a & ~b & c;
    if (table & 4) out |= ~a & b & ~c;
    if (table & 8) out |= ~a & b & c;
    if (table & 16) out |= a & ~b & ~c;
    if (table & 32) out |= a & ~b & c;
    if (table & 64) out |= a & b & ~c;
    if (table & 128) out |= a & b & c;
    return out;
  }

  static float flush(float v) {
    return std::fabs(v) < 1.17549435e-38f ? std::copysign(0.0f, v) : v;
  }

  /// a * b + c in the rounding that the instruction names.
  static float multiply_add(float a, float b, float c, int rounding) {
    const float nearest = std::fmaf(a, b, c);
    if (rounding == 0 || !std::isfinite(nearest)) return nearest;
    const double product = static_cast<double>(a) * b;  // exact
    const double sum = product + c;
    const double lost = (product - (sum - c)) + (c - (sum - (sum - c)));
    const bool above = nearest > sum || (nearest == sum && lost < 0);
    const bool below = nearest < sum || (nearest == sum && lost > 0);
    const bool down = rounding == 1 || (rounding == 3 && sum > 0);
    const bool up = rounding == 2 || (rounding == 3 && sum < 0);
    if (above && down) return std::nextafterf(nearest, -INFINITY);
    if (below && up) return std::nextafterf(nearest, INFINITY);
    return nearest;
  }

  static bool needs_slow_division(float a, float b) {
    const int ea = static_cast<int>(bits_of(a) >> 23 & 255),
              eb = static_cast<int>(bits_of(b) >> 23 & 255);
    if (eb == 0 || eb >= 253 || ea == 255) return true;
    if (a == 0.0f) return false;
    return ea - eb >= 126 || ea - eb <= -126 || ea <= 24;
  }

  template <class T>
  static T saturated(double v) {
    if (std::isnan(v))
      return sizeof(T) == 8 && std::is_signed<T>::value ? std::numeric_limits<T>::min() : 0;
    if (v <= static_cast<double>(std::numeric_limits<T>::min()))
      return std::numeric_limits<T>::min();
    if (v >= static_cast<double>(std::numeric_limits<T>::max()))
      return std::numeric_limits<T>::max();
    return static_cast<T>(v);
  }

  static double rounded(double v, int rounding) {
    switch (rounding) {
      case 1:
        return std::floor(v);
      case 2:
        return std::ceil(v);
      case 3:
        return std::trunc(v);
      default:
        return std::nearbyint(v);
    }
  }

  /// The nearest float, or the next one up where the instruction rounds up.
  static float narrowed(long double v, int rounding) {
    float f = static_cast<float>(v);
    if (rounding == 2 && f < v) f = std::nextafterf(f, INFINITY);
    if (rounding == 1 && f > v) f = std::nextafterf(f, -INFINITY);
    if (rounding == 3 && std::fabs(static_cast<long double>(f)) > std::fabs(v))
      f = std::nextafterf(f, 0);
    return f;
  }

  // ----------------------------------------------------------------------------------------- step

  void step(Warp& w, size_t at);

  const Launch& l_;
  uint32_t ctaid_[3] = {};
  uint32_t at_ = 0;  // the newest instruction, for errors
  std::vector<std::unique_ptr<Warp>> warp_;
  std::vector<uint8_t> shared_;
  L1 l1_;
  SectorSet read_, written_;
};

void Machine::step(Warp& w, size_t at) {
  Path& path = w.path[at];
  if (path.pc >= l_.instructions) wrong("ran past the end of the code");
  at_ = path.pc;
  const Instruction& in = l_.code[path.pc];
  const Operand* o = in.operand;
  Count& count = l_.counts[path.pc];
  ++count.issues;
  ++w.issues;
  uint32_t guard = in.guard_uniform ? (w.upred[in.guard] ? kAll : 0) : w.pred[in.guard];
  if (in.guard_inverted) guard = ~guard;
  const uint32_t mask = path.mask & guard;
  count.lanes += static_cast<uint64_t>(__builtin_popcount(mask));
  if (mask == 0) {
    ++path.pc;
    return;
  }
  uint32_t ra[kLanes], rb[kLanes], rc[kLanes];
  float fa[kLanes], fb[kLanes], fc[kLanes];
  double da[kLanes], db[kLanes], dc[kLanes];
  uint64_t la[kLanes];
  uint64_t address[kLanes];
  int n = 1;  // the next source operand

  switch (in.operation) {
    case NOP:
    case YIELD:
    case DEPBAR:
    case LDGDEPBAR:
      break;

    // ------------------------------------------------------------------------------- control flow
    case BRA: {
      uint32_t taken = mask;
      int last = in.operands - 1;
      if (in.flags & kDiv) {
        if (path.mask == w.ureg[o[0].ureg]) taken = 0;
      } else if (in.flags & kConv) {
        if (path.mask != w.ureg[o[0].ureg]) taken = 0;
      } else {
        for (int i = 0; i < last; ++i) taken &= predicate(w, o[i]);
      }
      const auto target = static_cast<uint32_t>(o[last].value);
      if (taken == path.mask) {
        path.pc = target;
        return;
      }
      if (taken != 0) {
        path.mask &= ~taken;
        ++path.pc;
        w.path.push_back({target, taken, -1});
        return;
      }
      break;
    }
    case BSSY:
      w.barrier[o[0].reg] = path.mask;
      break;
    case BSYNC:
      if ((w.barrier[o[0].reg] & w.alive & ~path.mask) != 0) {
        ++path.pc;
        path.waits = o[0].reg;
        return;
      }
      break;
    case BREAK: {
      uint32_t leave = mask;
      for (int i = 0; i + 1 < in.operands; ++i) leave &= predicate(w, o[i]);
      w.barrier[o[in.operands - 1].reg] &= ~leave;
      break;
    }
    case WARPSYNC:
      if (in.flags & kCollective) wrong("a collective of a diverged warp");
      if ((w.alive & ~path.mask) != 0) {
        ++path.pc;
        path.waits = 17;
        return;
      }
      break;
    case BAR:
      ++path.pc;
      path.waits = 16;
      return;
    case EXIT: {
      uint32_t leave = mask;
      for (int i = 0; i < in.operands; ++i) leave &= predicate(w, o[i]);
      w.alive &= ~leave;
      path.mask &= ~leave;
      if (path.mask == 0) {
        w.path.erase(w.path.begin() + static_cast<std::ptrdiff_t>(at));
        return;
      }
      break;
    }
    case CALL:
      if (mask != path.mask) wrong("a call of part of a path");
      path.pc = static_cast<uint32_t>(o[0].value);
      return;
    case RET: {
      const uint32_t to = w.reg[o[0].reg][__builtin_ctz(mask)] / 16;
      for (int i = 0; i < kLanes; ++i) {
        if ((mask >> i & 1) && w.reg[o[0].reg][i] / 16 != to) wrong("a return to several places");
      }
      path.pc = to;
      return;
    }

    // ------------------------------------------------------------------------------------ integers
    case MOV:
    case UMOV: {
      const uint32_t* a = integer(w, o[1], ra);
      store(w, o[0], mask, 0, [&](int i) { return a[i]; });
      break;
    }
    case CS2R:
      if (o[1].value != 0) wrong("a special register of CS2R");
      store(w, o[0], mask, 0, [](int) { return 0u; });
      if (!(in.flags & kF32)) store(w, o[0], mask, 1, [](int) { return 0u; });
      break;
    case S2R:
    case S2UR: {
      const auto which = o[1].value;
      store(w, o[0], mask, 0, [&](int i) -> uint32_t {
        switch (which) {
          case 1:
            return w.first_thread + static_cast<uint32_t>(i);
          case 2:
          case 3:
            return 0;
          case 4:
          case 5:
          case 6:
            return ctaid_[which - 4];
          case 7:
            return static_cast<uint32_t>(i);
          case 9:
            return kSharedStart;
          default:
            return 0;  // the block's place in its cluster, and of windows nothing uses
        }
      });
      break;
    }
    case R2UR: {
      const uint32_t* a = integer(w, o[in.operands - 1], ra);
      const uint32_t v = a[__builtin_ctz(mask)];
      if (o[0].ureg != 63) w.ureg[o[0].ureg] = v;
      break;
    }
    case LDC:
    case ULDC: {
      if (in.flags & kSignedLoad) wrong("a signed constant");
      uint32_t out[4][kLanes] = {};  // first, because the target may be part of the address
      const int parts = std::max(1, in.bytes / 4);
      for (int i = 0; i < kLanes; ++i) {
        if ((mask >> i & 1) == 0) continue;
        auto offset = static_cast<uint32_t>(o[1].value);
        if (o[1].reg != 255) offset += w.reg[o[1].reg][i];
        if (o[1].ureg != 63) offset += w.ureg[o[1].ureg];
        for (int part = 0; part < parts; ++part, offset += 4) {
          const uint32_t word = constant(offset & ~3u);
          const uint32_t v = word >> (offset & 3) * 8;
          out[part][i] = in.bytes == 1 ? v & 0xff : in.bytes == 2 ? v & 0xffff : word;
        }
      }
      for (int part = 0; part < parts; ++part) {
        store(w, o[0], mask, part, [&](int i) { return out[part][i]; });
      }
      break;
    }
    case VIADD: {
      const uint32_t *a = integer(w, o[1], ra), *b = integer(w, o[2], rb);
      store(w, o[0], mask, 0, [&](int i) { return a[i] + b[i]; });
      break;
    }
    case IADD3:
    case UIADD3: {
      Operand carry_to[2];
      int carries = 0;
      while (o[n].kind == kPred || o[n].kind == kUpred) carry_to[carries++] = o[n++];
      const Operand &oa = o[n], &ob = o[n + 1], &oc = o[n + 2];
      // -x counts as ~x + 1: the carry out is that of the full sum.
      const uint32_t *a = raw(w, oa, 0, ra), *b = raw(w, ob, 0, rb), *c = raw(w, oc, 0, rc);
      const uint32_t in1 = in.flags & kX && in.operands > n + 3 ? predicate(w, o[n + 3]) : 0;
      const uint32_t in2 = in.flags & kX && in.operands > n + 4 ? predicate(w, o[n + 4]) : 0;
      uint64_t sum[kLanes];
      const auto ones = static_cast<uint64_t>(oa.negative + ob.negative + oc.negative);
      const bool na = oa.negative || oa.inverted, nb = ob.negative || ob.inverted,
                 nc = oc.negative || oc.inverted;
      for (int i = 0; i < kLanes; ++i) {
        sum[i] = static_cast<uint64_t>(na ? ~a[i] : a[i]) + (nb ? ~b[i] : b[i]) +
                 (nc ? ~c[i] : c[i]) + ones + (in1 >> i & 1) + (in2 >> i & 1);
      }
      // A negated RZ would carry by itself.
      uint32_t carry = 0, carry2 = 0;
      for (int i = 0; i < kLanes; ++i) {
        carry |= static_cast<uint32_t>(sum[i] >> 32 != 0) << i;
        carry2 |= static_cast<uint32_t>(sum[i] >> 32 > 1) << i;
      }
      store(w, o[0], mask, 0, [&](int i) { return static_cast<uint32_t>(sum[i]); });
      if (carries > 0) set_predicate(w, carry_to[0], carry, mask);
      if (carries > 1) set_predicate(w, carry_to[1], carry2, mask);
      break;
    }
    case IMAD:
    case UIMAD: {
      Operand carry_to{};
      if (o[n].kind == kPred || o[n].kind == kUpred) carry_to = o[n++];
      const uint32_t *a = integer(w, o[n], ra), *b = integer(w, o[n + 1], rb);
      const uint32_t extra = in.flags & kX && in.operands > n + 3 ? predicate(w, o[n + 3]) : 0;
      const bool is_unsigned = in.flags & kUnsigned;
      if (in.flags & (kWide | kHi)) {
        long_integer(w, o[n + 2], la);
        uint32_t carry = 0;
        uint64_t out[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const uint64_t product =
              is_unsigned ? static_cast<uint64_t>(a[i]) * b[i]
                          : static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(a[i])) *
                                                  static_cast<int32_t>(b[i]));
          const auto sum = static_cast<unsigned __int128>(product) + la[i] + (extra >> i & 1);
          out[i] = static_cast<uint64_t>(sum);
          carry |= static_cast<uint32_t>(sum >> 64 != 0) << i;
        }
        if (in.flags & kHi) {
          store(w, o[0], mask, 0, [&](int i) { return static_cast<uint32_t>(out[i] >> 32); });
        } else {
          store_long(w, o[0], mask, [&](int i) { return out[i]; });
        }
        if (carry_to.kind != kNone) set_predicate(w, carry_to, carry, mask);
      } else {
        if (carry_to.kind != kNone) wrong("a carry of a narrow IMAD");
        const uint32_t* c = integer(w, o[n + 2], rc);
        store(w, o[0], mask, 0, [&](int i) { return a[i] * b[i] + c[i] + (extra >> i & 1); });
      }
      break;
    }
    case LEA:
    case ULEA: {
      Operand carry_to{};
      if (o[n].kind == kPred || o[n].kind == kUpred) carry_to = o[n++];
      const uint32_t *a = integer(w, o[n], ra), *b = integer(w, o[n + 1], rb);
      if (in.flags & kHi) {
        int shift_at = n + 2;
        const uint32_t* high = nullptr;
        if (in.flags & kSx32) {
          for (int i = 0; i < kLanes; ++i)
            rc[i] = static_cast<uint32_t>(static_cast<int32_t>(a[i]) >> 31);
          high = rc;
        } else {
          high = integer(w, o[n + 2], rc);
          shift_at = n + 3;
        }
        const int shift = static_cast<int>(o[shift_at].value & 31);
        const uint32_t extra =
            in.flags & kX && in.operands > shift_at + 1 ? predicate(w, o[shift_at + 1]) : 0;
        uint64_t sum[kLanes];
        uint32_t carry = 0;
        for (int i = 0; i < kLanes; ++i) {
          const uint64_t v = static_cast<uint64_t>(high[i]) << 32 | a[i];
          sum[i] = (v << shift >> 32) + b[i] + (extra >> i & 1);
          carry |= static_cast<uint32_t>(sum[i] >> 32 != 0) << i;
        }
        store(w, o[0], mask, 0, [&](int i) { return static_cast<uint32_t>(sum[i]); });
        if (carry_to.kind != kNone) set_predicate(w, carry_to, carry, mask);
      } else {
        const int shift = static_cast<int>(o[n + 2].value & 31);
        uint64_t sum[kLanes];
        uint32_t carry = 0;
        for (int i = 0; i < kLanes; ++i) {
          sum[i] = static_cast<uint64_t>(a[i] << shift) + b[i];
          carry |= static_cast<uint32_t>(sum[i] >> 32 != 0) << i;
        }
        store(w, o[0], mask, 0, [&](int i) { return static_cast<uint32_t>(sum[i]); });
        if (carry_to.kind != kNone) set_predicate(w, carry_to, carry, mask);
      }
      break;
    }
    case LOP3:
    case ULOP3: {
      Operand zero_to{};
      int dst = 0;
      if (o[0].kind == kPred || o[0].kind == kUpred) {
        zero_to = o[0];
        dst = 1;
        n = 2;
      }
      const uint32_t *a = integer(w, o[n], ra), *b = integer(w, o[n + 1], rb),
                     *c = integer(w, o[n + 2], rc);
      const auto table = static_cast<uint32_t>(o[n + 3].value);
      uint32_t out[kLanes], set = 0;
      for (int i = 0; i < kLanes; ++i) {
        out[i] = logic(table, a[i], b[i], c[i]);
        set |= static_cast<uint32_t>(out[i] != 0) << i;
      }
      const uint32_t with = in.operands > n + 4 ? predicate(w, o[n + 4]) : 0;
      store(w, o[dst], mask, 0, [&](int i) { return out[i]; });
      if (zero_to.kind != kNone) set_predicate(w, zero_to, set | with, mask);
      break;
    }
    case SHF:
    case USHF: {
      const uint32_t *a = integer(w, o[1], ra), *s = integer(w, o[2], rb),
                     *c = integer(w, o[3], rc);
      const uint32_t most = in.flags & kLong ? 64 : 32;
      store(w, o[0], mask, 0, [&](int i) -> uint32_t {
        uint32_t shift = in.flags & kWrap ? s[i] & (most - 1) : std::min(s[i], most);
        const uint64_t v = static_cast<uint64_t>(c[i]) << 32 | a[i];
        uint64_t out;
        if (in.flags & kLeft) {
          out = shift >= 64 ? 0 : v << shift;
        } else if (in.flags & kUnsigned) {
          out = shift >= 64 ? 0 : v >> shift;
        } else {
          out = static_cast<uint64_t>(static_cast<int64_t>(v) >> std::min(shift, 63u));
        }
        return static_cast<uint32_t>(in.flags & kHi ? out >> 32 : out);
      });
      break;
    }
    case PRMT:
    case UPRMT: {
      const uint32_t *a = integer(w, o[1], ra), *s = integer(w, o[2], rb),
                     *c = integer(w, o[3], rc);
      store(w, o[0], mask, 0, [&](int i) {
        const uint64_t v = static_cast<uint64_t>(c[i]) << 32 | a[i];
        uint32_t out = 0;
        for (int j = 0; j < 4; ++j) {
          const uint32_t pick = s[i] >> 4 * j & 15;
          uint32_t byte = static_cast<uint32_t>(v >> 8 * (pick & 7)) & 255;
          if (pick & 8) byte = byte & 128 ? 255 : 0;
          out |= byte << 8 * j;
        }
        return out;
      });
      break;
    }
    case SEL:
    case USEL:
    case FSEL: {
      const Operand &oa = o[1], &ob = o[2];
      const uint32_t choose = predicate(w, o[3]);
      uint32_t a[kLanes], b[kLanes];
      if (in.operation == FSEL) {
        const float *x = real(w, oa, fa), *y = real(w, ob, fb);
        std::memcpy(a, x, sizeof(a));
        std::memcpy(b, y, sizeof(b));
      } else {
        std::memcpy(a, integer(w, oa, ra), sizeof(a));
        std::memcpy(b, integer(w, ob, rb), sizeof(b));
      }
      store(w, o[0], mask, 0, [&](int i) { return choose >> i & 1 ? a[i] : b[i]; });
      break;
    }
    case ISETP:
    case UISETP: {
      const uint32_t *a = integer(w, o[2], ra), *b = integer(w, o[3], rb);
      uint32_t result = 0;
      const uint32_t low = in.flags & kExtended ? predicate(w, o[5]) : 0;
      for (int i = 0; i < kLanes; ++i) {
        const bool less = in.flags & kUnsigned
                              ? a[i] < b[i]
                              : static_cast<int32_t>(a[i]) < static_cast<int32_t>(b[i]);
        bool v = compare(in.compare, less, a[i] == b[i], false);
        if (in.flags & kExtended && a[i] == b[i]) v = low >> i & 1;
        result |= static_cast<uint32_t>(v) << i;
      }
      const uint32_t with = predicate(w, o[4]);
      const uint32_t first = combined(in.combine, result, with);
      const uint32_t second = combined(in.combine, ~result, with);
      set_predicate(w, o[0], first, mask);
      set_predicate(w, o[1], second, mask);
      break;
    }
    case VIMNMX:
    case IMNMX:
    case UIMNMX:
    case VIADDMNMX: {
      const uint32_t *a = integer(w, o[1], ra), *b = integer(w, o[2], rb);
      const uint32_t* c = b;
      int at_predicate = 3;
      if (in.operation == VIADDMNMX) {
        c = integer(w, o[3], rc);
        at_predicate = 4;
      }
      const uint32_t smaller = predicate(w, o[at_predicate]);
      store(w, o[0], mask, 0, [&](int i) {
        const uint32_t x = in.operation == VIADDMNMX ? a[i] + b[i] : a[i];
        const bool less =
            in.flags & kUnsigned ? x < c[i] : static_cast<int32_t>(x) < static_cast<int32_t>(c[i]);
        return less == ((smaller >> i & 1) != 0) ? x : c[i];
      });
      break;
    }
    case VIMNMX3: {
      const uint32_t *a = integer(w, o[1], ra), *b = integer(w, o[2], rb),
                     *c = integer(w, o[3], rc);
      const uint32_t smaller = predicate(w, o[4]);
      store(w, o[0], mask, 0, [&](int i) {
        const bool least = (smaller >> i & 1) != 0;
        const auto pick = [&](uint32_t x, uint32_t y) {
          const bool less =
              in.flags & kUnsigned ? x < y : static_cast<int32_t>(x) < static_cast<int32_t>(y);
          return less == least ? x : y;
        };
        return pick(pick(a[i], b[i]), c[i]);
      });
      break;
    }
    case IABS: {
      const uint32_t* a = integer(w, o[1], ra);
      store(w, o[0], mask, 0,
            [&](int i) { return static_cast<int32_t>(a[i]) < 0 ? 0u - a[i] : a[i]; });
      break;
    }
    case POPC:
    case UPOPC: {
      const uint32_t* a = integer(w, o[1], ra);
      store(w, o[0], mask, 0,
            [&](int i) { return static_cast<uint32_t>(__builtin_popcount(a[i])); });
      break;
    }
    case BREV:
    case UBREV: {
      const uint32_t* a = integer(w, o[1], ra);
      store(w, o[0], mask, 0, [&](int i) {
        uint32_t out = 0;
        for (int j = 0; j < 32; ++j) out |= (a[i] >> j & 1) << (31 - j);
        return out;
      });
      break;
    }
    case FLO:
    case UFLO: {
      if (!(in.flags & kUnsigned)) wrong("FLO of signed numbers");
      const uint32_t* a = integer(w, o[1], ra);
      store(w, o[0], mask, 0, [&](int i) {
        if (a[i] == 0) return kAll;
        const auto zeros = static_cast<uint32_t>(__builtin_clz(a[i]));
        return in.flags & kShow ? zeros : 31 - zeros;
      });
      break;
    }

    // ---------------------------------------------------------------------------------- predicates
    case PLOP3:
    case UPLOP3: {
      const uint32_t a = predicate(w, o[2]), b = predicate(w, o[3]), c = predicate(w, o[4]);
      set_predicate(w, o[0], logic(static_cast<uint32_t>(o[5].value), a, b, c), mask);
      if (in.operands > 6) {
        set_predicate(w, o[1], logic(static_cast<uint32_t>(o[6].value), a, b, c), mask);
      }
      break;
    }
    case P2R: {
      const uint32_t *b = integer(w, o[2], rb), *m = integer(w, o[3], rc);
      store(w, o[0], mask, 0, [&](int i) {
        uint32_t bits = 0;
        for (int j = 0; j < 7; ++j) bits |= (w.pred[j] >> i & 1) << j;
        return (bits & m[i]) | (b[i] & ~m[i]);
      });
      break;
    }
    case R2P: {
      const uint32_t *a = integer(w, o[1], ra), *m = integer(w, o[2], rb);
      uint32_t value[7] = {};
      for (int j = 0; j < 7; ++j) {
        for (int i = 0; i < kLanes; ++i) value[j] |= (a[i] >> j & 1) << i;
        if (m[0] >> j & 1) w.pred[j] = (w.pred[j] & ~mask) | (value[j] & mask);
      }
      break;
    }
    case VOTE:
    case VOTEU: {
      int source = in.operands - 1;
      const uint32_t yes = predicate(w, o[source]) & mask;
      const bool result = in.flags & kAll_ ? yes == mask : yes != 0;
      for (int i = 0; i < source; ++i) {
        if (o[i].kind == kPred || o[i].kind == kUpred) {
          set_predicate(w, o[i], result ? kAll : 0, mask);
        } else {
          store(w, o[i], mask, 0, [&](int) { return yes; });
        }
      }
      break;
    }
    case SHFL: {
      const uint32_t *v = integer(w, o[2], ra), *lane = integer(w, o[3], rb),
                     *c = integer(w, o[4], rc);
      uint32_t out[kLanes], valid = 0;
      for (int i = 0; i < kLanes; ++i) {
        const int segment = static_cast<int>(c[i] >> 8 & 31), clamp = static_cast<int>(c[i] & 31);
        const int least = i & segment, most = least | (clamp & ~segment);
        const int by = static_cast<int>(lane[i] & 31);
        int from = 0;
        bool ok = false;
        if (in.flags & kUp) {
          from = i - by;
          ok = from >= most;
        } else if (in.flags & kDown) {
          from = i + by;
          ok = from <= most;
        } else if (in.flags & kButterfly) {
          from = i ^ by;
          ok = from <= most;
        } else {
          from = least | (by & ~segment);
          ok = from <= most;
        }
        if (!ok) from = i;
        out[i] = v[from];
        valid |= static_cast<uint32_t>(ok) << i;
      }
      store(w, o[1], mask, 0, [&](int i) { return out[i]; });
      set_predicate(w, o[0], valid, mask);
      break;
    }

    // ------------------------------------------------------------------------------ 32-bit numbers
    case FADD: {
      const float *a = real(w, o[1], fa), *b = real(w, o[2], fb);
      store(w, o[0], mask, 0, [&](int i) {
        const float v = a[i] + b[i];
        return bits_of(in.flags & kFtz ? flush(v) : v);
      });
      break;
    }
    case FMUL: {
      const float *a = real(w, o[1], fa), *b = real(w, o[2], fb);
      store(w, o[0], mask, 0, [&](int i) {
        const float v = a[i] * b[i];
        return bits_of(in.flags & kFtz ? flush(v) : v);
      });
      break;
    }
    case FFMA: {
      const float *a = real(w, o[1], fa), *b = real(w, o[2], fb), *c = real(w, o[3], fc);
      if (in.rounding == 0) {
        store(w, o[0], mask, 0, [&](int i) { return bits_of(__builtin_fmaf(a[i], b[i], c[i])); });
      } else {
        store(w, o[0], mask, 0,
              [&](int i) { return bits_of(multiply_add(a[i], b[i], c[i], in.rounding)); });
      }
      break;
    }
    case FMNMX: {
      const float *a = real(w, o[1], fa), *b = real(w, o[2], fb);
      const uint32_t smaller = predicate(w, o[3]);
      store(w, o[0], mask, 0, [&](int i) -> uint32_t {
        if (in.flags & kNan && (std::isnan(a[i]) || std::isnan(b[i]))) return 0x7fffffffu;
        return bits_of(smaller >> i & 1 ? std::fmin(a[i], b[i]) : std::fmax(a[i], b[i]));
      });
      break;
    }
    case FSETP:
    case FSET: {
      const int first = in.operation == FSET ? 1 : 2;
      const float *a = real(w, o[first], fa), *b = real(w, o[first + 1], fb);
      uint32_t result = 0;
      for (int i = 0; i < kLanes; ++i) {
        result |= static_cast<uint32_t>(compare(in.compare, a[i] < b[i], a[i] == b[i],
                                                std::isnan(a[i]) || std::isnan(b[i])))
                  << i;
      }
      const uint32_t with = predicate(w, o[first + 2]);
      const uint32_t out = combined(in.combine, result, with);
      if (in.operation == FSET) {
        store(w, o[0], mask, 0, [&](int i) { return out >> i & 1 ? 0x3f800000u : 0u; });
      } else {
        const uint32_t other = combined(in.combine, ~result, with);
        set_predicate(w, o[0], out, mask);
        set_predicate(w, o[1], other, mask);
      }
      break;
    }
    case FCHK: {
      const float *a = real(w, o[1], fa), *b = real(w, o[2], fb);
      uint32_t slow = 0;
      for (int i = 0; i < kLanes; ++i)
        slow |= static_cast<uint32_t>(needs_slow_division(a[i], b[i])) << i;
      set_predicate(w, o[0], slow, mask);
      break;
    }
    case MUFU: {
      if (in.flags & kHalf64) {
        const uint32_t* a = integer(w, o[1], ra);
        store(w, o[0], mask, 0, [&](int i) {
          const double x = as_double(static_cast<uint64_t>(a[i]) << 32);
          return static_cast<uint32_t>(bits_of(in.flags & kRsq ? 1 / std::sqrt(x) : 1 / x) >> 32);
        });
        break;
      }
      const float* a = real(w, o[1], fa);
      store(w, o[0], mask, 0, [&](int i) {
        const float x = a[i];
        const double y = x;
        if (in.flags & kRcp) return bits_of(1 / x);
        if (in.flags & kRsq) return bits_of(static_cast<float>(1 / std::sqrt(y)));
        if (in.flags & kSqrt) return bits_of(std::sqrt(x));
        if (in.flags & kEx2) return bits_of(static_cast<float>(std::exp2(y)));
        if (in.flags & kLg2) return bits_of(static_cast<float>(std::log2(y)));
        if (in.flags & kSin) return bits_of(static_cast<float>(std::sin(y)));
        if (in.flags & kCos) return bits_of(static_cast<float>(std::cos(y)));
        wrong("an unknown function of MUFU");
      });
      break;
    }
    case FRND: {
      if (in.from == kFloat64) {
        long_real(w, o[1], da);
        store_long(w, o[0], mask, [&](int i) { return bits_of(rounded(da[i], in.rounding)); });
        break;
      }
      const float* a = real(w, o[1], fa);
      store(w, o[0], mask, 0,
            [&](int i) { return bits_of(static_cast<float>(rounded(a[i], in.rounding))); });
      break;
    }

    // ------------------------------------------------------------------------------ 64-bit numbers
    case DADD: {
      long_real(w, o[1], da);
      long_real(w, o[2], db);
      store_long(w, o[0], mask, [&](int i) { return bits_of(da[i] + db[i]); });
      break;
    }
    case DMUL: {
      long_real(w, o[1], da);
      long_real(w, o[2], db);
      store_long(w, o[0], mask, [&](int i) { return bits_of(da[i] * db[i]); });
      break;
    }
    case DFMA: {
      long_real(w, o[1], da);
      long_real(w, o[2], db);
      long_real(w, o[3], dc);
      store_long(w, o[0], mask, [&](int i) { return bits_of(__builtin_fma(da[i], db[i], dc[i])); });
      break;
    }
    case DSETP: {
      long_real(w, o[2], da);
      long_real(w, o[3], db);
      uint32_t result = 0;
      for (int i = 0; i < kLanes; ++i) {
        result |= static_cast<uint32_t>(compare(in.compare, da[i] < db[i], da[i] == db[i],
                                                std::isnan(da[i]) || std::isnan(db[i])))
                  << i;
      }
      const uint32_t with = predicate(w, o[4]);
      const uint32_t first = combined(in.combine, result, with);
      const uint32_t second = combined(in.combine, ~result, with);
      set_predicate(w, o[0], first, mask);
      set_predicate(w, o[1], second, mask);
      break;
    }

    // ----------------------------------------------------------------------------------
    // conversions
    case F2F: {
      if (in.to == kFloat64) {
        const float* a = real(w, o[1], fa);
        store_long(w, o[0], mask, [&](int i) { return bits_of(static_cast<double>(a[i])); });
      } else if (in.from == kFloat64) {
        long_real(w, o[1], da);
        store(w, o[0], mask, 0, [&](int i) { return bits_of(static_cast<float>(da[i])); });
      } else {
        wrong("a conversion of F2F");
      }
      break;
    }
    case F2FP: {
      const float *a = real(w, o[1], fa), *b = real(w, o[2], fb);
      store(w, o[0], mask, 0, [&](int i) -> uint32_t {
        const uint16_t high = in.flags & kBf16 ? to_bf16(a[i]) : to_half(a[i]);
        const uint16_t low = in.flags & kBf16 ? to_bf16(b[i]) : to_half(b[i]);
        return static_cast<uint32_t>(high) << 16 | low;
      });
      break;
    }
    case F2I: {
      if (in.from == kFloat64) {
        long_real(w, o[1], da);
      } else {
        const float* a = real(w, o[1], fa);
        for (int i = 0; i < kLanes; ++i) da[i] = a[i];
      }
      for (int i = 0; i < kLanes; ++i) da[i] = rounded(da[i], in.rounding);
      switch (in.to) {
        case kS64:
          store_long(w, o[0], mask,
                     [&](int i) { return static_cast<uint64_t>(saturated<int64_t>(da[i])); });
          break;
        case kU64:
          store_long(w, o[0], mask, [&](int i) { return saturated<uint64_t>(da[i]); });
          break;
        case kU32:
          store(w, o[0], mask, 0, [&](int i) { return saturated<uint32_t>(da[i]); });
          break;
        case kS32:
          store(w, o[0], mask, 0,
                [&](int i) { return static_cast<uint32_t>(saturated<int32_t>(da[i])); });
          break;
        default:
          wrong("a conversion of F2I");
      }
      break;
    }
    case I2F:
    case I2FP: {
      long double v[kLanes];
      if (in.from == kS64 || in.from == kU64) {
        long_integer(w, o[1], la);
        for (int i = 0; i < kLanes; ++i) {
          v[i] = in.from == kS64 ? static_cast<long double>(static_cast<int64_t>(la[i]))
                                 : static_cast<long double>(la[i]);
        }
      } else {
        const uint32_t* a = integer(w, o[1], ra);
        for (int i = 0; i < kLanes; ++i) {
          switch (in.from) {
            case kU32:
              v[i] = a[i];
              break;
            case kU16:
              v[i] = a[i] & 0xffff;
              break;
            case kU8:
              v[i] = a[i] & 0xff;
              break;
            case kS32:
              v[i] = static_cast<int32_t>(a[i]);
              break;
            default:
              wrong("a conversion of I2F");
          }
        }
      }
      if (in.to == kFloat64) {
        store_long(w, o[0], mask, [&](int i) { return bits_of(static_cast<double>(v[i])); });
      } else {
        store(w, o[0], mask, 0, [&](int i) { return bits_of(narrowed(v[i], in.rounding)); });
      }
      break;
    }
    case HADD2:
    case HMUL2:
    case HFMA2: {
      float a[2][kLanes], b[2][kLanes], c[2][kLanes] = {};
      halves(w, o[1], a);
      halves(w, o[2], b);
      if (in.flags & kF32) {
        store(w, o[0], mask, 0, [&](int i) { return bits_of(a[0][i] + b[0][i]); });
        break;
      }
      if (in.operation == HFMA2) halves(w, o[3], c);
      store(w, o[0], mask, 0, [&](int i) {
        uint16_t out[2];
        for (int j = 0; j < 2; ++j) {
          const double product = static_cast<double>(a[j][i]) * b[j][i];
          const double v = in.operation == HADD2   ? static_cast<double>(a[j][i]) + b[j][i]
                           : in.operation == HMUL2 ? product
                                                   : product + c[j][i];
          out[j] = to_half(static_cast<float>(v));
        }
        return static_cast<uint32_t>(out[1]) << 16 | out[0];
      });
      break;
    }

    // ----------------------------------------------------------------------------------------
    // memory
    case LDG:
    case LD: {
      addresses(w, o[1], mask, address);
      count_global(count, address, mask, in.bytes, false, true);
      load(w, in, o[0], mask, [&](int i) { return reinterpret_cast<const uint8_t*>(address[i]); });
      break;
    }
    case STG:
    case ST: {
      addresses(w, o[0], mask, address);
      count_global(count, address, mask, in.bytes, true, false);
      save(w, in, o[1], mask, [&](int i) { return reinterpret_cast<uint8_t*>(address[i]); });
      break;
    }
    case REDG:
    case RED: {
      addresses(w, o[0], mask, address);
      count_global(count, address, mask, in.bytes, true, false);
      if (!(in.flags & kF32)) wrong("a reduction that is not of floats");
      for (int i = 0; i < kLanes; ++i) {
        if ((mask >> i & 1) == 0) continue;
        float v;
        std::memcpy(&v, reinterpret_cast<void*>(address[i]), 4);
        v += as_float(w.reg[o[1].reg][i]);
        std::memcpy(reinterpret_cast<void*>(address[i]), &v, 4);
      }
      break;
    }
    case ATOM:
    case ATOMG: {
      addresses(w, o[2], mask, address);
      count_global(count, address, mask, in.bytes, true, false);
      if (in.flags & kCas) wrong("a compare and swap");
      for (int i = 0; i < kLanes; ++i) {
        if ((mask >> i & 1) == 0) continue;
        uint16_t v[2];
        std::memcpy(v, reinterpret_cast<void*>(address[i]), 4);
        const uint32_t add = w.reg[o[3].reg][i];
        v[0] = to_half(from_half(v[0]) + from_half(static_cast<uint16_t>(add)));
        v[1] = to_half(from_half(v[1]) + from_half(static_cast<uint16_t>(add >> 16)));
        std::memcpy(reinterpret_cast<void*>(address[i]), v, 4);
      }
      set_predicate(w, o[0], kAll, mask);  // done; false would mean another kind of memory
      break;
    }
    case QSPC:
      set_predicate(w, o[0], 0, mask);
      break;
    case LDS: {
      addresses(w, o[1], mask, address);
      count.passes += bank_passes(address, mask, in.bytes);
      count.bytes += static_cast<uint64_t>(__builtin_popcount(mask)) * in.bytes;
      load(w, in, o[0], mask, [&](int i) { return shared(address[i], in.bytes); });
      break;
    }
    case STS: {
      addresses(w, o[0], mask, address);
      count.passes += bank_passes(address, mask, in.bytes);
      count.bytes += static_cast<uint64_t>(__builtin_popcount(mask)) * in.bytes;
      save(w, in, o[1], mask, [&](int i) { return shared(address[i], in.bytes); });
      break;
    }
    case LDGSTS: {
      uint64_t target[kLanes];
      addresses(w, o[0], mask, target);
      addresses(w, o[1], mask, address);
      uint32_t copied = mask;
      if (in.operands > 2) copied &= predicate(w, o[2]);
      count.passes += bank_passes(target, mask, in.bytes);
      if (copied != 0) count_global(count, address, copied, in.bytes, false, true);
      for (int i = 0; i < kLanes; ++i) {
        if ((mask >> i & 1) == 0) continue;
        if (copied >> i & 1) {
          std::memcpy(shared(target[i], in.bytes), reinterpret_cast<void*>(address[i]), in.bytes);
        } else {
          std::memset(shared(target[i], in.bytes), 0, in.bytes);
        }
      }
      break;
    }
    case LDL:
      addresses(w, o[1], mask, address);
      load(w, in, o[0], mask, [&](int i) { return local(w, i, address[i], in.bytes); });
      break;
    case STL:
      addresses(w, o[0], mask, address);
      save(w, in, o[1], mask, [&](int i) { return local(w, i, address[i], in.bytes); });
      break;
    default:
      wrong("an instruction that the machine does not know");
  }
  ++path.pc;
}

std::string failure;

sigjmp_buf before_fault;

void fault(int) { siglongjmp(before_fault, 1); }

/// Addresses come out of the program that runs: a wrong one is an error of it, not of this process.
class FaultGuard {
 public:
  FaultGuard() {
    struct sigaction action = {};
    action.sa_handler = fault;
    sigaction(SIGSEGV, &action, &previous_);
  }
  ~FaultGuard() { sigaction(SIGSEGV, &previous_, nullptr); }

 private:
  struct sigaction previous_;
};

}  // namespace

extern "C" const char* sass_operations() {
#define SASS_TEXT(name) #name " "
  return SASS_OPERATIONS(SASS_TEXT);
#undef SASS_TEXT
}

extern "C" uint64_t sass_size(int which) {
  return which == 0   ? sizeof(Operand)
         : which == 1 ? sizeof(Instruction)
         : which == 2 ? sizeof(Count)
                      : sizeof(Launch);
}

/// Returns nullptr, or what went wrong.
extern "C" const char* sass_run(const Launch* launch) {
  const auto machine = std::make_unique<Machine>(*launch);
  FaultGuard guard;
  if (sigsetjmp(before_fault, 1) != 0) {
    failure = "bad global address in " + machine->place();
    return failure.c_str();
  }
  try {
    machine->run();
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
  return nullptr;
}
