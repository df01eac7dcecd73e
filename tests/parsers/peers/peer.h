/* What both C parsers are called by: PROGRAM NAME FILE REPETITIONS prints the nanoseconds of user time for one head. */
#ifndef PEER_H
#define PEER_H

#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>

/* Parses one whole head and returns how many fields it has; less than 0: not a whole head. */
static long parse(const char *head, size_t length);

static double user_time(void)
{
	struct rusage u;

	getrusage(RUSAGE_SELF, &u);
	return u.ru_utime.tv_sec * 1e9 + u.ru_utime.tv_usec * 1e3;
}

int main(int argc, char **argv)
{
	static char head[1 << 16];
	long times, fields = 0;
	size_t length;
	double began;
	FILE *file;

	if (argc != 4 || !(file = fopen(argv[2], "rb")))
		return fprintf(stderr, "usage: %s NAME FILE REPETITIONS\n", argv[0]), 2;
	length = fread(head, 1, sizeof(head), file);
	times = atol(argv[3]);
	began = user_time();
	for (long i = 0; i < times; i++) {
		long n = parse(head, length);

		if (n < 0)
			return fprintf(stderr, "%s: not a whole head\n", argv[1]), 1;
		fields += n;
	}
	if (fields < times)
		return fprintf(stderr, "%s: no fields\n", argv[1]), 1;
	printf("%.1f\n", (user_time() - began) / times);
	return 0;
}

#endif
