/* Preloaded into a process: the nth call that changes files under one folder fails, stops halfway, or is the last.

   Calls are counted over all processes of a family through one shared page, the file named by FAILNTH_PAGE, so that
   a tester can set a page, fork, and read the count afterwards without starting anything anew:

     offset  0  int64  count     calls so far; the tester sets it to 0
             8  int64  nth       the call that is hit; 0 hits none
            16  int32  action    see enum action
            20  int32  error     errno of FAIL
            24  int32  for_ever  1: every later call of the family is hit too, as on a disk that stays full
            28  int32  cut       FS_IOC_SHUTDOWN's argument for CUT
            32  char[2048]       calls count on paths that begin with this; empty: nothing counts
          2080  char[1024]       file to which each counted call is appended: number, name, path; empty: none
          3104  char[512]        mount point that CUT shuts down

   gcc -shared -fPIC -O1 -o failnth.so failnth.c */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum action { FAIL = 0, KILL = 1, SHORT = 2, CUT = 3 };

struct page {
    int64_t count, nth;
    int32_t action, error, for_ever, cut;
    char under[2048], log[1024], mount_point[512];
};

#define REAL(result, name, ...) ((result(*)(__VA_ARGS__))real(#name))

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

static struct page *the_page(void) {
    static struct page *page;
    const char *path = getenv("FAILNTH_PAGE");
    if (page == NULL && path != NULL) {
        int fd = REAL(int, open, const char *, int, ...)(path, O_RDWR | O_CLOEXEC);
        if (fd >= 0) {
            void *mapped = mmap(NULL, sizeof(struct page), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
            page = mapped == MAP_FAILED ? NULL : mapped;
            close(fd);
        }
    }
    return page;
}

static int counts(const char *path) {
    struct page *page = the_page();
    return page != NULL && page->under[0] != 0 && strncmp(path, page->under, strlen(page->under)) == 0;
}

/* The path as the kernel knows it; relative ones hang on a folder's descriptor or the working folder. */
static const char *absolute(int folder, const char *path, char *buffer, size_t size) {
    if (path == NULL || path[0] == '/') return path;
    char link[64];
    if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, buffer, size - 1);
    if (length <= 0) return NULL;
    snprintf(buffer + length, size - length, "/%s", path);
    return buffer;
}

static void note(struct page *page, int64_t number, const char *call, const char *path) {
    if (page->log[0] == 0) return;
    char line[4600];
    int length = snprintf(line, sizeof line, "%ld\t%s\t%s\n", (long)number, call, path);
    int fd = REAL(int, open, const char *, int, ...)(page->log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (REAL(ssize_t, write, int, const void *, size_t)(fd, line, length) < 0) abort();
    close(fd);
}

static __thread int cuts_after_this;

/* Counts a call. Returns 1 when it has to fail, with errno set; 2 when a write has to stop halfway. */
static int hit(const char *call, const char *path) {
    if (path == NULL || !counts(path)) return 0;
    struct page *page = the_page();
    int64_t number = __sync_add_and_fetch(&page->count, 1);
    note(page, number, call, path);
    if (page->nth == 0 || number < page->nth || (number > page->nth && !page->for_ever)) return 0;
    if (page->action == KILL) kill(getpid(), SIGKILL);
    if (page->action == CUT) {
        cuts_after_this = 1; /* the call is carried out first: see done */
        return 0;
    }
    if (page->action == SHORT) return 2;
    errno = page->error;
    return 1;
}

/* The call has been carried out: now the power goes, with everything that no fsync has brought to the disk. */
static void done(void) {
    if (!cuts_after_this) return;
    struct page *page = the_page();
    int fd = REAL(int, open, const char *, int, ...)(page->mount_point, O_RDONLY | O_CLOEXEC);
    uint32_t how = page->cut;
    if (fd < 0 || ioctl(fd, _IOR('X', 125, uint32_t), &how) != 0) abort();
    kill(getpid(), SIGKILL);
}

#define RESULT(type, call)                                                                                          \
    do {                                                                                                            \
        type result = (call);                                                                                       \
        int kept = errno;                                                                                           \
        done();                                                                                                     \
        errno = kept;                                                                                               \
        return result;                                                                                              \
    } while (0)

static const char *of_descriptor(int fd, char *buffer, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, buffer, size - 1);
    if (length <= 0) return NULL;
    buffer[length] = 0;
    return buffer;
}

static int hit_fd(const char *call, int fd) {
    char buffer[4096];
    if (fd <= 2 || the_page() == NULL || the_page()->under[0] == 0) return 0;
    return hit(call, of_descriptor(fd, buffer, sizeof buffer));
}

static int hit_at(const char *call, int folder, const char *path) {
    char buffer[4096];
    return hit(call, absolute(folder, path, buffer, sizeof buffer));
}

static size_t half(size_t size, int how) { return how == 2 && size > 1 ? size / 2 : size; }

ssize_t write(int fd, const void *data, size_t size) {
    int how = hit_fd("write", fd);
    if (how == 1) return -1;
    RESULT(ssize_t, REAL(ssize_t, write, int, const void *, size_t)(fd, data, half(size, how)));
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    int how = hit_fd("pwrite", fd);
    if (how == 1) return -1;
    RESULT(ssize_t, REAL(ssize_t, pwrite, int, const void *, size_t, off_t)(fd, data, half(size, how), at));
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    int how = hit_fd("pwrite", fd);
    if (how == 1) return -1;
    RESULT(ssize_t, REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t)(fd, data, half(size, how), at));
}

ssize_t writev(int fd, const struct iovec *parts, int number) {
    int how = hit_fd("writev", fd);
    if (how == 1) return -1;
    RESULT(ssize_t, REAL(ssize_t, writev, int, const struct iovec *, int)(fd, parts, how == 2 ? 1 : number));
}

ssize_t sendfile(int to, int from, off_t *at, size_t size) {
    int how = hit_fd("sendfile", to);
    if (how == 1) return -1;
    RESULT(ssize_t, REAL(ssize_t, sendfile, int, int, off_t *, size_t)(to, from, at, half(size, how)));
}

ssize_t sendfile64(int to, int from, off64_t *at, size_t size) {
    int how = hit_fd("sendfile", to);
    if (how == 1) return -1;
    RESULT(ssize_t, REAL(ssize_t, sendfile64, int, int, off64_t *, size_t)(to, from, at, half(size, how)));
}

#define ON_DESCRIPTOR(name, parameters, arguments, ...)                                                             \
    int name parameters {                                                                                           \
        if (hit_fd(#name, fd) == 1) return -1;                                                                      \
        RESULT(int, REAL(int, name, __VA_ARGS__) arguments);                                                        \
    }
ON_DESCRIPTOR(fsync, (int fd), (fd), int)
ON_DESCRIPTOR(fdatasync, (int fd), (fd), int)
ON_DESCRIPTOR(ftruncate, (int fd, off_t size), (fd, size), int, off_t)
ON_DESCRIPTOR(ftruncate64, (int fd, off64_t size), (fd, size), int, off64_t)

#define ON_PATH(name, counted, folder, parameters, arguments, ...)                                                  \
    int name parameters {                                                                                           \
        if (hit_at(#name, folder, counted) == 1) return -1;                                                         \
        RESULT(int, REAL(int, name, __VA_ARGS__) arguments);                                                        \
    }
#define TEXT const char *
ON_PATH(rename, to, AT_FDCWD, (TEXT from, TEXT to), (from, to), TEXT, TEXT)
ON_PATH(renameat, to, y, (int x, TEXT from, int y, TEXT to), (x, from, y, to), int, TEXT, int, TEXT)
ON_PATH(renameat2, to, y, (int x, TEXT from, int y, TEXT to, unsigned how), (x, from, y, to, how), int, TEXT, int, TEXT,
        unsigned)
ON_PATH(link, to, AT_FDCWD, (TEXT from, TEXT to), (from, to), TEXT, TEXT)
ON_PATH(unlink, path, AT_FDCWD, (TEXT path), (path), TEXT)
ON_PATH(unlinkat, path, folder, (int folder, TEXT path, int how), (folder, path, how), int, TEXT, int)
ON_PATH(rmdir, path, AT_FDCWD, (TEXT path), (path), TEXT)
ON_PATH(mkdir, path, AT_FDCWD, (TEXT path, mode_t mode), (path, mode), TEXT, mode_t)
ON_PATH(mkdirat, path, folder, (int folder, TEXT path, mode_t mode), (folder, path, mode), int, TEXT, mode_t)

/* Opening counts where it may change the file or make it. */
static int writes(int flags) { return (flags & (O_CREAT | O_TRUNC)) != 0 || (flags & O_ACCMODE) != O_RDONLY; }

#define OPENS(name)                                                                                                 \
    int name(const char *path, int flags, ...) {                                                                    \
        va_list more;                                                                                               \
        va_start(more, flags);                                                                                      \
        mode_t mode = va_arg(more, mode_t);                                                                         \
        va_end(more);                                                                                               \
        if (writes(flags) && hit_at("open", AT_FDCWD, path) == 1) return -1;                                        \
        RESULT(int, REAL(int, name, const char *, int, ...)(path, flags, mode));                                    \
    }
#define OPENS_AT(name)                                                                                              \
    int name(int folder, const char *path, int flags, ...) {                                                        \
        va_list more;                                                                                               \
        va_start(more, flags);                                                                                      \
        mode_t mode = va_arg(more, mode_t);                                                                         \
        va_end(more);                                                                                               \
        if (writes(flags) && hit_at("open", folder, path) == 1) return -1;                                          \
        RESULT(int, REAL(int, name, int, const char *, int, ...)(folder, path, flags, mode));                       \
    }
OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)
