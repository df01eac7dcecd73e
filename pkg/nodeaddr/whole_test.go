package nodeaddr

import (
	"errors"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
)

func TestWholeAsksUntilNothingChangedMeanwhile(t *testing.T) {
	failure := errors.New("no permission")
	for name, tc := range map[string]struct {
		interrupted int
		end         error
		want        []int
		err         error
		asked       int
	}{
		"at once":           {0, nil, []int{1, 2}, nil, 1},
		"interrupted twice": {2, nil, []int{1, 2}, nil, 3},
		"another error":     {1, failure, nil, failure, 2},
		"for ever":          {1 << 30, nil, []int{1}, netlink.ErrDumpInterrupted, wholeTries},
	} {
		t.Run(name, func(t *testing.T) {
			asked := 0
			got, err := Whole(func() ([]int, error) {
				if asked++; asked <= tc.interrupted {
					return []int{1}, netlink.ErrDumpInterrupted
				}
				if tc.end != nil {
					return nil, tc.end
				}
				return []int{1, 2}, nil
			})
			if !slices.Equal(got, tc.want) || !errors.Is(err, tc.err) || asked != tc.asked {
				t.Errorf("%v, %v after %d; want %v, %v after %d", got, err, asked, tc.want, tc.err, tc.asked)
			}
		})
	}
}
