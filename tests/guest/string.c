/* SPDX-License-Identifier: GPL-2.0-only */
/* The few string and number routines that the guest needs, for there is no libc. */
#include "guest.h"

void *memset(void *to, int byte, size_t length)
{
	void *start = to;

	asm volatile("rep stosb" : "+D"(to), "+c"(length) : "a"(byte) : "memory");
	return start;
}

void *memcpy(void *to, const void *from, size_t length)
{
	void *start = to;

	asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(length) : : "memory");
	return start;
}

int memcmp(const void *a, const void *b, size_t length)
{
	const u8 *p = a, *q = b;

	for (; length; length--, p++, q++)
		if (*p != *q)
			return *p - *q;
	return 0;
}

size_t strlen(const char *s)
{
	const char *end = s;

	while (*end)
		end++;
	return end - s;
}

int strcmp(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return (u8)*a - (u8)*b;
}

int strncmp(const char *a, const char *b, size_t length)
{
	for (; length; length--, a++, b++)
		if (*a != *b || !*a)
			return (u8)*a - (u8)*b;
	return 0;
}

char *strchr(const char *s, int c)
{
	for (; *s; s++)
		if (*s == c)
			return (char *)s;
	return NULL;
}

bool parse_number(const char *s, u64 *value)
{
	u32 base = 10;

	*value = 0;
	if (s[0] == '0' && (s[1] == 'x' || s[1] == 'X')) {
		base = 16;
		s += 2;
	}
	if (!*s)
		return false;
	for (; *s; s++) {
		u32 digit = *s >= '0' && *s <= '9'   ? *s - '0'
			    : *s >= 'a' && *s <= 'f' ? *s - 'a' + 10
			    : *s >= 'A' && *s <= 'F' ? *s - 'A' + 10
						     : 99;
		if (digit >= base)
			return false;
		*value = *value * base + digit;
	}
	return true;
}

/* Two 64-by-32 divisions; the compiler would call libgcc for one of 64 by 64. */
u64 div_u64(u64 value, u32 by, u32 *remainder)
{
	u32 high = value >> 32, low = value, rest = 0, high_result;

	asm("divl %4" : "=a"(high_result), "=d"(rest) : "0"(high), "1"(0), "r"(by));
	asm("divl %4" : "=a"(low), "=d"(rest) : "0"(low), "1"(rest), "r"(by));
	if (remainder)
		*remainder = rest;
	return (u64)high_result << 32 | low;
}

u32 fnv1a(u32 hash, const void *data, size_t length)
{
	for (const u8 *p = data; length; length--)
		hash = (hash ^ *p++) * 16777619u;
	return hash;
}

/* xorshift32; a state of 0 would stay there. */
u32 random_next(u32 *state)
{
	u32 x = *state ? *state : 0x9e3779b9;

	x ^= x << 13;
	x ^= x >> 17;
	x ^= x << 5;
	return *state = x;
}

struct output {
	char *to;
	size_t size, length;
};

static void put(struct output *out, char c)
{
	if (out->length + 1 < out->size)
		out->to[out->length] = c;
	out->length++;
}

static void put_number(struct output *out, u64 value, u32 base, int width, char pad, bool negative)
{
	char digits[24];
	int n = 0;

	do {
		u32 digit;

		value = div_u64(value, base, &digit);
		digits[n++] = "0123456789abcdef"[digit];
	} while (value);
	if (negative)
		digits[n++] = '-';
	for (; width > n; width--)
		put(out, pad);
	while (n)
		put(out, digits[--n]);
}

/* %s %c %d %u %x %%, with ll, l, a width and 0; the length that it would have, as snprintf does. */
size_t vformat(char *to, size_t size, const char *fmt, va_list args)
{
	struct output out = { to, size, 0 };

	for (; *fmt; fmt++) {
		int width = 0, longs = 0;
		char pad = ' ';

		if (*fmt != '%') {
			put(&out, *fmt);
			continue;
		}
		fmt++;
		if (*fmt == '0')
			pad = '0';
		while (*fmt >= '0' && *fmt <= '9')
			width = width * 10 + *fmt++ - '0';
		while (*fmt == 'l') {
			longs++;
			fmt++;
		}
		switch (*fmt) {
		case 's': {
			const char *s = va_arg(args, const char *);
			int length = strlen(s);

			while (*s)
				put(&out, *s++);
			for (; width > length; width--)
				put(&out, ' ');
			break;
		}
		case 'c':
			put(&out, va_arg(args, int));
			break;
		case 'd': {
			int value = va_arg(args, int);

			put_number(&out, value < 0 ? -(u32)value : (u32)value, 10, width, pad, value < 0);
			break;
		}
		case 'u':
		case 'x': {
			u64 value = longs == 2 ? va_arg(args, u64) : va_arg(args, u32);

			put_number(&out, value, *fmt == 'x' ? 16 : 10, width, pad, false);
			break;
		}
		default:
			put(&out, *fmt);
		}
	}
	if (size)
		to[min(out.length, size - 1)] = 0;
	return out.length;
}

size_t format(char *to, size_t size, const char *fmt, ...)
{
	va_list args;
	size_t length;

	va_start(args, fmt);
	length = vformat(to, size, fmt, args);
	va_end(args);
	return length;
}

void print(const char *fmt, ...)
{
	static char line[1024];
	va_list args;
	size_t length;

	va_start(args, fmt);
	length = vformat(line, sizeof(line), fmt, args);
	va_end(args);
	console_write(line, min(length, sizeof(line) - 1));
}
