package controlplane

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
)

// Bounds of one of etcd's transactions, and how many run at a time.
const (
	maxOperations = 120
	maxBytes      = 1 << 20
	writers       = 4
)

// Store writes Services and EndpointSlices as an API server would store them, straight into etcd: a hundred thousand take
// seconds. No API server may run meanwhile: they tell events apart by etcd's revision, which here is one for many objects.
// Nothing is defaulted or checked; Services must have their cluster IPs, which are marked as taken.
func (cp *ControlPlane) Store(ctx context.Context, objects ...runtime.Object) error {
	s := &storing{ctx: ctx, cp: cp, client: &http.Client{Transport: &http.Transport{DialContext: cp.dial, MaxIdleConnsPerHost: writers}}, room: make(chan struct{}, writers)}
	defer s.client.CloseIdleConnections()
	for _, o := range objects {
		for _, o := range withAddresses(o) { // addresses first
			if err := s.add(o); err != nil {
				return err
			}
		}
	}
	s.send()
	s.wg.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// withAddresses adds the objects by which a Service's addresses are known to be taken.
func withAddresses(o runtime.Object) []runtime.Object {
	var all []runtime.Object
	if s, ok := o.(*corev1.Service); ok {
		for i, ip := range s.Spec.ClusterIPs {
			all = append(all, &networkingv1.IPAddress{
				ObjectMeta: metav1.ObjectMeta{Name: ip, UID: s.UID, CreationTimestamp: s.CreationTimestamp, Labels: map[string]string{
					networkingv1.LabelManagedBy: "ipallocator.k8s.io", networkingv1.LabelIPAddressFamily: string(s.Spec.IPFamilies[i]),
				}},
				Spec: networkingv1.IPAddressSpec{ParentRef: &networkingv1.ParentReference{Resource: "services", Namespace: s.Namespace, Name: s.Name}},
			})
		}
	}
	return append(all, o)
}

// storing is one call of Store.
type storing struct {
	ctx    context.Context
	cp     *ControlPlane
	client *http.Client
	room   chan struct{} // bounds the transactions under way
	wg     sync.WaitGroup

	puts []map[string]any
	size int

	mu  sync.Mutex
	err error // guarded by mu: the first
}

func (s *storing) add(o runtime.Object) error {
	var prefix string
	gv := corev1.SchemeGroupVersion
	var meta *metav1.ObjectMeta
	switch x := o.(type) {
	case *corev1.Service:
		prefix, meta = "services/specs", &x.ObjectMeta
	case *discoveryv1.EndpointSlice:
		prefix, meta, gv = "endpointslices", &x.ObjectMeta, discoveryv1.SchemeGroupVersion
	case *networkingv1.IPAddress:
		prefix, meta, gv = "ipaddresses", &x.ObjectMeta, networkingv1.SchemeGroupVersion
	default:
		return fmt.Errorf("controlplane: Store takes no %T", o)
	}
	key := "/registry/" + prefix + "/"
	if meta.Namespace != "" {
		key += meta.Namespace + "/"
	}
	info, ok := runtime.SerializerInfoForMediaType(scheme.Codecs.SupportedMediaTypes(), runtime.ContentTypeProtobuf)
	if !ok {
		return fmt.Errorf("client-go has no protobuf")
	}
	value, err := runtime.Encode(scheme.Codecs.EncoderForVersion(info.Serializer, gv), o)
	if err != nil {
		return fmt.Errorf("encode %s: %w", meta.Name, err)
	}
	if len(s.puts) == maxOperations || s.size+len(value) > maxBytes {
		s.send()
	}
	s.puts = append(s.puts, map[string]any{"requestPut": map[string][]byte{"key": []byte(key + meta.Name), "value": value}})
	s.size += len(value)
	return nil
}

// send makes one transaction of what was added since.
func (s *storing) send() {
	if len(s.puts) == 0 {
		return
	}
	body, err := json.Marshal(map[string]any{"success": s.puts})
	s.puts, s.size = nil, 0
	s.room <- struct{}{}
	s.wg.Go(func() {
		defer func() { <-s.room }()
		if err == nil {
			err = s.post(body)
		}
		if err != nil {
			s.mu.Lock()
			if s.err == nil {
				s.err = err
			}
			s.mu.Unlock()
		}
	})
}

func (s *storing) post(body []byte) error {
	ctx, cancel := context.WithTimeout(s.ctx, time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.cp.url+"/v3/kv/txn", bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return fmt.Errorf("store objects in etcd: %w", err)
	}
	defer resp.Body.Close()
	said, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("store objects in etcd: %s: %s", resp.Status, said)
	}
	return err
}

// Compact has etcd forget every revision but the present one, as it does on its own after some minutes: who wants to go on
// watching from an earlier one is told that it is gone, and has to list again.
func (cp *ControlPlane) Compact(ctx context.Context) error {
	var now struct {
		Header struct {
			Revision string `json:"revision"`
		} `json:"header"`
	}
	if err := cp.call(ctx, "/v3/kv/range", map[string]any{"key": []byte("/"), "count_only": true}, &now); err != nil {
		return err
	}
	return cp.call(ctx, "/v3/kv/compaction", map[string]any{"revision": now.Header.Revision, "physical": true}, &struct{}{})
}

// call asks etcd's gateway, which wants bytes in base64 and gives 64-bit numbers as text.
func (cp *ControlPlane) call(ctx context.Context, path string, question, answer any) error {
	body, err := json.Marshal(question)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, cp.url+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	client := http.Client{Transport: &http.Transport{DialContext: cp.dial, DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("etcd: %w", err)
	}
	defer resp.Body.Close()
	said, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("etcd: %s: %s", resp.Status, said)
	}
	if err != nil {
		return err
	}
	return json.Unmarshal(said, answer)
}
