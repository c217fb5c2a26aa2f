// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * vsock: what netcat is to TCP, for AF_VSOCK, in the guest.
 *
 *   vsock cid                          print the guest's own context id
 *   vsock [-q] connect CID PORT        standard input to the peer, the peer to standard output
 *   vsock [-q] listen PORT             the same with the first peer that connects
 *   vsock [-q] flood CID PORT BYTES    send zeros, wait until the peer closes, print the rate
 *
 * -q: SEQPACKET instead of STREAM.
 */
#include <err.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

static char buffer[64 * 1024];

static unsigned long number(const char *text)
{
	char *end;
	unsigned long value = strtoul(text, &end, 0);

	if (!*text || *end)
		errx(2, "not a number: %s", text);
	return value;
}

static struct sockaddr_vm address(unsigned cid, const char *port)
{
	struct sockaddr_vm a;

	memset(&a, 0, sizeof(a));
	a.svm_family = AF_VSOCK;
	a.svm_cid = cid;
	a.svm_port = number(port);
	return a;
}

static int reach(int type, const char *cid, const char *port)
{
	struct sockaddr_vm a = address(number(cid), port);
	int s = socket(AF_VSOCK, type, 0);

	if (s < 0 || connect(s, (struct sockaddr *)&a, sizeof(a)))
		err(1, "connect to %s port %s", cid, port);
	return s;
}

static int await(int type, const char *port)
{
	struct sockaddr_vm a = address(VMADDR_CID_ANY, port);
	int s = socket(AF_VSOCK, type, 0), peer;

	if (s < 0 || bind(s, (struct sockaddr *)&a, sizeof(a)) || listen(s, 1))
		err(1, "listen on port %s", port);
	peer = accept(s, NULL, NULL);
	if (peer < 0)
		err(1, "accept");
	close(s);
	return peer;
}

/* Moves one buffer; 0 at the end of the input. */
static int move(int from, int to)
{
	ssize_t have = read(from, buffer, sizeof(buffer)), sent = 0;

	if (have < 0)
		err(1, "read");
	while (sent < have) {
		ssize_t n = write(to, buffer + sent, have - sent);

		if (n < 0)
			err(1, "write");
		sent += n;
	}
	return have > 0;
}

static void relay(int s)
{
	struct pollfd watched[] = { { .fd = s, .events = POLLIN }, { .fd = 0, .events = POLLIN } };

	for (;;) {
		if (poll(watched, 2, -1) < 0)
			err(1, "poll");
		if (watched[0].revents && !move(s, 1))
			return;
		if (watched[1].revents && !move(0, s)) {
			shutdown(s, SHUT_WR);
			watched[1].fd = -1;
		}
	}
}

static void flood(int s, uint64_t bytes)
{
	struct timespec from, to;
	uint64_t left = bytes;
	double seconds;

	clock_gettime(CLOCK_MONOTONIC, &from);
	while (left) {
		ssize_t n = write(s, buffer, left < sizeof(buffer) ? left : sizeof(buffer));

		if (n < 0)
			err(1, "write");
		left -= n;
	}
	shutdown(s, SHUT_WR);
	while (read(s, buffer, sizeof(buffer)) > 0)
		;
	clock_gettime(CLOCK_MONOTONIC, &to);
	seconds = (to.tv_sec - from.tv_sec) + (to.tv_nsec - from.tv_nsec) / 1e9;
	printf("%llu bytes in %.3f s, %.1f MB/s\n", (unsigned long long)bytes, seconds, bytes / seconds / 1e6);
}

int main(int count, char **word)
{
	int type = SOCK_STREAM;

	if (count > 1 && !strcmp(word[1], "-q")) {
		type = SOCK_SEQPACKET;
		count--;
		word++;
	}
	if (count == 2 && !strcmp(word[1], "cid")) {
		unsigned cid;
		int f = open("/dev/vsock", O_RDONLY);

		if (f < 0 || ioctl(f, IOCTL_VM_SOCKETS_GET_LOCAL_CID, &cid))
			err(1, "/dev/vsock");
		printf("%u\n", cid);
	} else if (count == 4 && !strcmp(word[1], "connect")) {
		relay(reach(type, word[2], word[3]));
	} else if (count == 3 && !strcmp(word[1], "listen")) {
		relay(await(type, word[2]));
	} else if (count == 5 && !strcmp(word[1], "flood")) {
		flood(reach(type, word[2], word[3]), number(word[4]));
	} else {
		errx(2, "usage: vsock cid | [-q] connect CID PORT | listen PORT | flood CID PORT BYTES");
	}
	return 0;
}
