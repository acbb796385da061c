/* Runs a program as on a CPU without AVX-512, AMX, AVX-VNNI and bfloat16 instructions.

   Makes CPUID trap and masks its answer, so every library and compiler in the process uses its AVX2 code.
   Needs Linux 4.12 or later and an Intel CPU with CPUID faulting ("cpuid_fault" in /proc/cpuinfo).

   gcc -O2 -shared -fPIC -o avx2_only.so avx2_only.c -ldl
   LD_PRELOAD=$PWD/avx2_only.so python ... */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>
#ifndef ARCH_SET_CPUID
#define ARCH_SET_CPUID 0x1012
#endif
static int (*real_sigaction)(int, const struct sigaction *, struct sigaction *);
static struct sigaction next_handler;

static void on_segv(int number, siginfo_t *info, void *raw) {
  greg_t *r = ((ucontext_t *)raw)->uc_mcontext.gregs;
  const unsigned char *at = (const unsigned char *)r[REG_RIP];
  if (info->si_code == SI_KERNEL && at[0] == 0x0f && at[1] == 0xa2) {
    unsigned a, b, c, d, leaf = r[REG_RAX], sub = r[REG_RCX];
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
    __cpuid_count(leaf, sub, a, b, c, d);
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
    if (leaf == 7 && sub == 0) {
      b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31);
      c &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);
      d &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);
    } else if (leaf == 7 && sub == 1) {
      a &= ~(1u << 4 | 1u << 5 | 1u << 21 | 1u << 23);
      d &= ~(1u << 4 | 1u << 5 | 1u << 19);
    }
    r[REG_RAX] = a; r[REG_RBX] = b; r[REG_RCX] = c; r[REG_RDX] = d;
    r[REG_RIP] += 2;
    return;
  }
  if (next_handler.sa_flags & SA_SIGINFO && next_handler.sa_sigaction) { next_handler.sa_sigaction(number, info, raw); return; }
  if (next_handler.sa_handler && next_handler.sa_handler != SIG_IGN) { next_handler.sa_handler(number); return; }
  signal(SIGSEGV, SIG_DFL);
}
int sigaction(int number, const struct sigaction *new, struct sigaction *old) {
  if (!real_sigaction) real_sigaction = dlsym(RTLD_NEXT, "sigaction");
  if (number != SIGSEGV) return real_sigaction(number, new, old);
  if (old) *old = next_handler;
  if (new) next_handler = *new;
  return 0;
}
__attribute__((constructor)) static void start(void) {
  real_sigaction = dlsym(RTLD_NEXT, "sigaction");
  struct sigaction mine; memset(&mine, 0, sizeof mine);
  mine.sa_sigaction = on_segv; mine.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  real_sigaction(SIGSEGV, &mine, NULL);
  if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) perror("arch_prctl(ARCH_SET_CPUID)");
}
