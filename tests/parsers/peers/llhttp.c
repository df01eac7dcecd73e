/* llhttp calls back with pieces of names and values; who wants fields has to note where they are, as here. */
#include <string.h>

#include "llhttp.h"
#include "peer.h"

struct field {
	const char *name, *value;
	size_t name_length, value_length;
};

static struct field fields[64];
static long count;
static int complete;

static int on_name(llhttp_t *p, const char *at, size_t length)
{
	(void)p;
	if (count == 64)
		return -1;
	fields[count].name = at;
	fields[count].name_length = length;
	return 0;
}

static int on_value(llhttp_t *p, const char *at, size_t length)
{
	(void)p;
	fields[count].value = at;
	fields[count++].value_length = length;
	return 0;
}

static int on_headers_complete(llhttp_t *p)
{
	(void)p;
	complete = 1;
	return 0;
}

static long parse(const char *head, size_t length)
{
	static llhttp_settings_t settings;
	llhttp_t parser;

	if (!settings.on_header_field) {
		llhttp_settings_init(&settings);
		settings.on_header_field = on_name;
		settings.on_header_value = on_value;
		settings.on_headers_complete = on_headers_complete;
	}
	llhttp_init(&parser, HTTP_REQUEST, &settings);
	count = complete = 0;
	if (llhttp_execute(&parser, head, length) != HPE_OK || !complete)
		return -1;
	return count;
}
