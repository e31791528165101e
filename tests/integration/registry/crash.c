/* Kills the process at the n-th call that changes a file below a directory.
 *
 * Threads are counted together and one at a time. Calls they make at the same moment come in any
 * order, which is what a test wants: no order among them may matter.
 *
 * Preloaded, so that it sees the calls of the interpreter and of SQLite alike; the code under
 * test knows nothing of it. Calls that only read are left out: being killed before one is the
 * same as being killed before the next one that changes something. Every call is logged before
 * it is made, as `name path` or `rename source -> target`, and traced to LOG.trace with all it
 * would do to a disk: a line `name TAB path TAB target TAB offset TAB size`, then `size` bytes.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char root[PATH_MAX];
static int armed;
static long left;      /* calls still to be made */
static int tear;       /* half of a write is done before the process dies */
static int logged = -1;
static int traced = -1;
static ssize_t (*real_write)(int, const void *, size_t);
static pthread_mutex_t logging = PTHREAD_MUTEX_INITIALIZER;

void crash_arm(const char *directory, long calls, int torn, const char *log) {
    logged = open(log, O_WRONLY | O_CREAT | O_APPEND, 0600);
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s.trace", log);
    traced = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    real_write = dlsym(RTLD_NEXT, "write");
    strncpy(root, directory, sizeof root - 1);
    tear = torn;
    left = calls;
    armed = 1;
}

static void die(void) { kill(getpid(), SIGKILL); }

static void trace(const char *name, const char *path, const char *target, long offset,
                  const void *data, size_t size) {
    if (!armed || strncmp(path, root, strlen(root)) != 0) return;
    pthread_mutex_lock(&logging);
    dprintf(traced, "%s\t%s\t%s\t%ld\t%zu\n", name, path, target, offset, data ? size : 0);
    if (data) real_write(traced, data, size);
    pthread_mutex_unlock(&logging);
}

static void trace_at(const char *name, int fd, long offset, const void *data, size_t size) {
    char link[64], path[PATH_MAX];
    if (!armed) return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return;
    path[length] = 0;
    trace(name, path, "", offset, data, size);
}

/* Whether the process is to die at this call. */
static int due(const char *name, const char *path, const char *target) {
    if (!armed || strncmp(path, root, strlen(root)) != 0) return 0;
    pthread_mutex_lock(&logging);
    dprintf(logged, target ? "%s %s -> %s\n" : "%s %s\n", name, path, target);
    int now = left-- == 0;
    /* Nobody else gets on while this one dies. */
    if (!now) pthread_mutex_unlock(&logging);
    return now;
}

static int due_at(const char *name, int fd) {
    char link[64], path[PATH_MAX];
    if (!armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return due(name, path, NULL);
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define OPEN(symbol) \
    int symbol(const char *path, int flags, ...) { \
        REAL(int, #symbol, const char *, int, ...); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (flags & (O_CREAT | O_TRUNC) && due("open", path, NULL)) die(); \
        if (flags & (O_CREAT | O_TRUNC)) \
            trace(flags & O_TRUNC ? "truncated" : "open", path, "", 0, NULL, 0); \
        return real(path, flags, mode); \
    }
#define WRITE_AT(symbol, offset) \
    ssize_t symbol(int fd, const void *data, size_t size, offset at) { \
        REAL(ssize_t, #symbol, int, const void *, size_t, offset); \
        if (due_at("write", fd)) { \
            if (tear) real(fd, data, size / 2, at); \
            die(); \
        } \
        trace_at("write", fd, (long)at, data, size); \
        return real(fd, data, size, at); \
    }
#define ON_FD(symbol) \
    int symbol(int fd) { \
        REAL(int, #symbol, int); \
        if (due_at("fsync", fd)) die(); \
        trace_at("fsync", fd, 0, NULL, 0); \
        return real(fd); \
    }
#define TRUNCATE(symbol, offset) \
    int symbol(int fd, offset size) { \
        REAL(int, #symbol, int, offset); \
        if (due_at("truncate", fd)) die(); \
        trace_at("truncate", fd, (long)size, NULL, 0); \
        return real(fd, size); \
    }
#define ON_PATH(symbol) \
    int symbol(const char *path) { \
        REAL(int, #symbol, const char *); \
        if (due(#symbol, path, NULL)) die(); \
        trace(#symbol, path, "", 0, NULL, 0); \
        return real(path); \
    }
#define WITH_MODE(symbol) \
    int symbol(const char *path, mode_t mode) { \
        REAL(int, #symbol, const char *, mode_t); \
        if (due(#symbol, path, NULL)) die(); \
        trace(#symbol, path, "", 0, NULL, 0); \
        return real(path, mode); \
    }

OPEN(open)
OPEN(open64)
WRITE_AT(pwrite, off_t)
WRITE_AT(pwrite64, off64_t)
ON_FD(fsync)
ON_FD(fdatasync)
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)
ON_PATH(unlink)
ON_PATH(rmdir)
WITH_MODE(mkdir)
WITH_MODE(chmod)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (due_at("write", fd)) {
        if (tear) real(fd, data, size / 2);
        die();
    }
    trace_at("write", fd, lseek(fd, 0, SEEK_CUR), data, size);
    return real(fd, data, size);
}

int rename(const char *source, const char *target) {
    REAL(int, "rename", const char *, const char *);
    if (due("rename", source, target)) die();
    trace("rename", source, target, 0, NULL, 0);
    return real(source, target);
}

int unlinkat(int fd, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    char link[64], full[PATH_MAX];
    if (fd == AT_FDCWD) {
        snprintf(full, sizeof full, "%s", path);
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(link, full, sizeof full - 1);
        if (length < 0) return real(fd, path, flags);
        snprintf(full + length, sizeof full - length, "/%s", path);
    }
    if (due("unlink", full, NULL)) die();
    trace("unlink", full, "", 0, NULL, 0);
    return real(fd, path, flags);
}
