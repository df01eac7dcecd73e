package sample

type sqe struct {
	opcode uint8
	fd     int32
}

const (
	opSend   = 26
	opSplice = 30
)

func ring(e *sqe, which uint8) {
	e.opcode = opSplice       // caught: IORING_OP_SPLICE
	e.opcode, e.fd = 33, 1    // caught: IORING_OP_TEE
	_ = sqe{opcode: opSplice} // caught: IORING_OP_SPLICE
	e.opcode = which          // caught: the operation of an io_uring request must be a constant
	e.opcode, e.fd = opSend, 1
}
