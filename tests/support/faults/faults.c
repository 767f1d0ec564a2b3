/* Makes a storage call of a program fail, tear, stop or be its last one. For LD_PRELOAD.
 *
 * Rules, one a line, come from the file that FAULTS_RULES names (read at the start and by faults_read()), or from
 * faults_arm():
 *     CALL ACTION RANK NTH PART
 * CALL: write fsync rename mkdir unlink rmdir create ftruncate, or any. ACTION: an errno as a number,
 * or KILL, TORN (half of a write, then KILL), SHORT (half of a write), STOP, LOG. RANK: that of the
 * process, or -1. NTH: which call that matches, 0 for each. PART: what the path must contain.
 * What was done is appended to the file that FAULTS_LOG names: rank, call, action, path.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { NONE = 0, KILL = -1, TORN = -2, SHORT = -3, STOP = -4, LOG = -5 };
enum { MAX_RULES = 64 };

struct rule {
    char call[16], word[16], part[256];
    int action, rank;
    long nth;
    atomic_long seen;
};

static struct rule rules[MAX_RULES];
static int num_rules;

static void add_rule(const char *line)
{
    static const char *words[] = {"KILL", "TORN", "SHORT", "STOP", "LOG"};
    struct rule *rule = &rules[num_rules];
    if (num_rules == MAX_RULES ||
        sscanf(line, "%15s %15s %d %ld %255s", rule->call, rule->word, &rule->rank, &rule->nth, rule->part) != 5)
        return;
    rule->action = atoi(rule->word);
    for (int i = 0; i < 5; i++)
        if (!strcmp(rule->word, words[i]))
            rule->action = -1 - i;
    atomic_store(&rule->seen, 0);
    num_rules++;
}

/* Replace all rules by this one; an empty line removes them. */
void faults_arm(const char *line)
{
    num_rules = 0;
    add_rule(line);
}

/* Replace all rules by those of the file that FAULTS_RULES names now. */
__attribute__((constructor)) void faults_read(void)
{
    const char *path = getenv("FAULTS_RULES");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[512];
    num_rules = 0;
    while (file && fgets(line, sizeof line, file))
        add_rule(line);
    if (file)
        fclose(file);
}

static void absolute(int folder, const char *path, char *out)
{
    char link[64];
    ssize_t length = 0;
    out[0] = 0;
    if (!path || path[0] != '/') {
        snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
        length = readlink(link, out, PATH_MAX - 1);
        if (length < 0)
            length = 0;
        out[length] = 0;
    }
    if (path)
        snprintf(out + length, PATH_MAX - length, length ? "/%s" : "%s", path);
}

static void note(const struct rule *rule, const char *call, const char *path)
{
    const char *log = getenv("FAULTS_LOG"), *rank = getenv("RANK");
    char line[PATH_MAX + 64];
    if (!log)
        return;
    int length = snprintf(line, sizeof line, "%s %s %s %s\n", rank ? rank : "-", call, rule->word, path);
    int file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    syscall(SYS_write, file, line, length);
    syscall(SYS_close, file);
}

static int decide(const char *call, int folder, const char *path)
{
    char whole[PATH_MAX];
    int known = 0, saved = errno, action = NONE;
    const char *rank = getenv("RANK");
    for (int i = 0; i < num_rules && !action; i++) {
        struct rule *rule = &rules[i];
        if ((strcmp(rule->call, "any") && strcmp(rule->call, call)) ||
            (rule->rank >= 0 && (!rank || atoi(rank) != rule->rank)))
            continue;
        if (!known++)
            absolute(folder, path, whole);
        if (!strstr(whole, rule->part))
            continue;
        long number = atomic_fetch_add(&rule->seen, 1) + 1;
        if (rule->nth && number != rule->nth)
            continue;
        action = rule->action;
        note(rule, call, whole);
    }
    errno = saved;
    if (action == KILL)
        kill(getpid(), SIGKILL);
    if (action == STOP)
        kill(getpid(), SIGSTOP);
    if (action > 0)
        errno = action;
    return action;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *data, size_t count)
{
    int action = num_rules ? decide("write", file, NULL) : NONE;
    if (action > 0)
        return -1;
    if (action == TORN || action == SHORT) {
        ssize_t done = syscall(SYS_write, file, data, action == SHORT && count < 2 ? count : count / 2);
        if (action == TORN)
            kill(getpid(), SIGKILL);
        return done;
    }
    return syscall(SYS_write, file, data, count);
}

#define FAIL(call, folder, path) (num_rules && decide(call, folder, path) > 0)

int fsync(int file) { return FAIL("fsync", file, NULL) ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return FAIL("fsync", file, NULL) ? -1 : REAL(fdatasync)(file); }
int ftruncate(int file, off_t size) { return FAIL("ftruncate", file, NULL) ? -1 : REAL(ftruncate)(file, size); }
int ftruncate64(int file, off64_t size) { return FAIL("ftruncate", file, NULL) ? -1 : REAL(ftruncate64)(file, size); }
/* A rename is told by where it leads to: that name decides what it publishes. */
int rename(const char *from, const char *to) { return FAIL("rename", AT_FDCWD, to) ? -1 : REAL(rename)(from, to); }
int renameat(int f, const char *from, int t, const char *to)
{
    return FAIL("rename", t, to) ? -1 : REAL(renameat)(f, from, t, to);
}
int mkdir(const char *path, mode_t mode) { return FAIL("mkdir", AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode); }
int mkdirat(int f, const char *path, mode_t mode) { return FAIL("mkdir", f, path) ? -1 : REAL(mkdirat)(f, path, mode); }
int unlink(const char *path) { return FAIL("unlink", AT_FDCWD, path) ? -1 : REAL(unlink)(path); }
int rmdir(const char *path) { return FAIL("rmdir", AT_FDCWD, path) ? -1 : REAL(rmdir)(path); }
int unlinkat(int f, const char *path, int flags)
{
    return FAIL(flags & AT_REMOVEDIR ? "rmdir" : "unlink", f, path) ? -1 : REAL(unlinkat)(f, path, flags);
}

#define OPEN_BODY(folder, path, flags, call)                                                                           \
    mode_t mode = 0;                                                                                                   \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                                               \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode = va_arg(rest, mode_t);                                                                                   \
        va_end(rest);                                                                                                  \
    }                                                                                                                  \
    return (flags & O_CREAT) && FAIL("create", folder, path) ? -1 : call

int open(const char *path, int flags, ...) { OPEN_BODY(AT_FDCWD, path, flags, REAL(open)(path, flags, mode)); }
int open64(const char *path, int flags, ...) { OPEN_BODY(AT_FDCWD, path, flags, REAL(open64)(path, flags, mode)); }
int openat(int f, const char *path, int flags, ...) { OPEN_BODY(f, path, flags, REAL(openat)(f, path, flags, mode)); }
int openat64(int f, const char *path, int flags, ...)
{
    OPEN_BODY(f, path, flags, REAL(openat64)(f, path, flags, mode));
}
