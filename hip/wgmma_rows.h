// Level 3: the warpgroup instruction with its 64 rows out of registers: sums[row][token] +=
// rows[row] [k] * tokens[token][k] over 16 k, N tokens in LDS as mma.h's wgmma_tile has them. Of
// wave w, lane l has rows 16 w + l / 4 and 8 more: the operand's words are k 2 * (l % 4) on of
// both, then k + 8 of both. Element e of the sums is token 8 * (e / 4) + 2 * (l % 4) + e % 2 of row
// l / 4 + 8 * (e / 2 % 2).
#pragma once
#include "mma.h"

#if MPAD_HAVE_WGMMA

template <class T, int N> struct WgmmaRows;

#    define MPAD_SUMS8(C, I)                                                                       \
        "+f"(C[I]), "+f"(C[I + 1]), "+f"(C[I + 2]), "+f"(C[I + 3]), "+f"(C[I + 4]),                \
            "+f"(C[I + 5]), "+f"(C[I + 6]), "+f"(C[I + 7])
#    define MPAD_SUMS16(C, I) MPAD_SUMS8(C, I), MPAD_SUMS8(C, I + 8)
#    define MPAD_SUMS32(C, I) MPAD_SUMS16(C, I), MPAD_SUMS16(C, I + 16)
#    define MPAD_SUMS64(C, I) MPAD_SUMS32(C, I), MPAD_SUMS32(C, I + 32)
#    define MPAD_NAMES8 "%0,%1,%2,%3,%4,%5,%6,%7"
#    define MPAD_NAMES16 MPAD_NAMES8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#    define MPAD_NAMES32                                                                           \
        MPAD_NAMES16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#    define MPAD_NAMES64                                                                           \
        MPAD_NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,"   \
                     "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
// OPERANDS: the names of the operand's words, of the tokens and of whether sums are added to.
#    define MPAD_WGMMA_ROWS(TYPE, NAME, N, SUMS, NAMES, ROWS, TOKENS, ADDED)                       \
        template <> struct WgmmaRows<TYPE, N> {                                                    \
            static DEV void multiply(float (&c)[SUMS], const u32 (&rows)[4], u64 tokens,           \
                                     bool is_added)                                                \
            {                                                                                      \
                asm volatile("{.reg .pred p;\n"                                                    \
                             "setp.ne.u32 p,%" ADDED ",0;\n"                                       \
                             "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME       \
                             " {" NAMES "},{" ROWS "},%" TOKENS ",p,1,1,0;}"                       \
                             : MPAD_SUMS##SUMS(c, 0)                                               \
                             : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]),             \
                               "l"(tokens), "r"((u32)is_added));                                   \
            }                                                                                      \
        };
#    define MPAD_WGMMA_ROWS_OF(TYPE, NAME)                                                         \
        MPAD_WGMMA_ROWS(TYPE, NAME, 16, 8, MPAD_NAMES8, "%8,%9,%10,%11", "12", "13")               \
        MPAD_WGMMA_ROWS(TYPE, NAME, 32, 16, MPAD_NAMES16, "%16,%17,%18,%19", "20", "21")           \
        MPAD_WGMMA_ROWS(TYPE, NAME, 64, 32, MPAD_NAMES32, "%32,%33,%34,%35", "36", "37")           \
        MPAD_WGMMA_ROWS(TYPE, NAME, 128, 64, MPAD_NAMES64, "%64,%65,%66,%67", "68", "69")
MPAD_WGMMA_ROWS_OF(Bf16, "bf16")
MPAD_WGMMA_ROWS_OF(F16, "f16")

// Sums that were on their way may be read from here on.
template <int SUMS> DEV void wgmma_arrive(float (&c)[SUMS])
{
    UNROLL for (int i = 0; i < SUMS; i += 8) asm volatile("" : MPAD_SUMS8(c, i)::"memory");
}

#endif
