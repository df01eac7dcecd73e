/* picohttpparser as Debian's libh2o has it: the library exports it without a header file. */
#include "peer.h"

struct phr_header {
	const char *name;
	size_t name_len;
	const char *value;
	size_t value_len;
};

int phr_parse_request(const char *buf, size_t len, const char **method, size_t *method_len, const char **path,
		      size_t *path_len, int *minor_version, struct phr_header *headers, size_t *num_headers,
		      size_t last_len);

static long parse(const char *head, size_t length)
{
	struct phr_header headers[64];
	size_t count = 64, method_length, path_length;
	const char *method, *path;
	int minor;

	if (phr_parse_request(head, length, &method, &method_length, &path, &path_length, &minor, headers, &count, 0) < 0)
		return -1;
	return count;
}
