package mesh

// Placeholders for the compiled look-up structures; each gets a file of its own.
type (
	claimIndex   struct{}
	hostIndex    struct{}
	routeIndex   struct{}
	chainMatcher struct{}
)
